"""KubeRay: the jobs of a namespace as RayJobs, through kubectl. What Cluster is for a Ray cluster."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from ray.job_submission import JobStatus

from batch.spec import JobSpec
from engine.errors import UserError
from jobs.kubectl import kubectl, kubectl_json, kubectl_shown, render_overlay
from jobs.rayjob import DIGITS, NAME, OUTPUT, check_images, make_rayjob, to_yaml
from jobs.submission import Submission, next_label, output_digits, select

NAMESPACE = "moray"
DASHBOARD = "http://127.0.0.1:8265"  # in the head's pod
HAS_ENDED = ("Complete", "Failed", "ValidationFailed")


def render_job(
    spec: JobSpec, overlay: str, namespace: str, image: str | None, before: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """All objects of a submission; `before`: the names of those that this job has had. Raises UserError."""
    name = next_label(spec.name, spec.output.path, before)
    return make_rayjob(render_overlay(overlay), spec, name, namespace=namespace, image=image)


class KubeRay:
    """namespace: where moray's RayJobs are."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def submissions(self) -> list[Submission]:
        """Those of moray, the first one first."""
        found = kubectl_json(["get", "rayjobs.ray.io", "--selector=app.kubernetes.io/name=moray", *self._here])
        ours = [o for o in found["items"] if OUTPUT in o["metadata"].get("annotations", {})]
        return [submission_of(o) for o in sorted(ours, key=lambda o: o["metadata"]["creationTimestamp"])]

    def find(self, target: str) -> Submission:
        """As select."""
        return select(self.submissions(), target, f"namespace {self._namespace}")

    def submit(self, spec: JobSpec, overlay: str, image: str | None) -> Submission:
        """Start a job. What jobs share is applied; the RayJob and its ConfigMap must be new.

        Raises UserError where a RayJob with this output folder has not ended.
        """
        check_images(render_job(spec, overlay, self._namespace, image))  # mistakes come before the cluster is asked
        same = [one for one in self.submissions() if one.output == spec.output.path.rstrip("/")]
        if running := [one for one in same if not one.is_over]:
            raise UserError(
                f"{running[-1].output} is being written by {running[-1].id}. See it: moray logs {running[-1].id} "
                f"--kuberay; stop it: moray cancel {running[-1].id} --kuberay"
            )
        objects = render_job(spec, overlay, self._namespace, image, self._names_of(spec.output.path))
        own = [o for o in objects if OUTPUT in o["metadata"].get("annotations", {})]
        kubectl(["apply", "--filename=-"], to_yaml([o for o in objects if o not in own]))
        kubectl(["create", "--filename=-"], to_yaml(own))
        return self.find(own[0]["metadata"]["name"])

    def show_logs(self, submission: Submission, *, follow: bool) -> int:
        """What the job writes, on the terminal; returns kubectl's exit code. Raises UserError where no head runs."""
        job = self._get(submission.id)
        head = self._find_head(job)
        if head is None:
            raise UserError(
                f"{submission.id} has no head that runs ({submission.message or 'no cluster'}); its counts are in its "
                f"output: moray status {submission.output}"
            )
        return kubectl_shown(self._in_head(head, job, "logs", *(["--follow"] if follow else [])))

    def stop(self, submission: Submission) -> str:
        """Let the job finish what is in flight, and wait for it; one that does not run is deleted. Returns what became
        of it.

        Ray is told, not Kubernetes: a RayJob that is deleted or suspended takes its pods along at once.
        """
        job = self._get(submission.id)
        head = self._find_head(job)
        if head is not None and job["status"].get("jobStatus"):
            kubectl(self._in_head(head, job, "stop"))  # which waits for it
            return f"has ended: moray status {submission.output}"
        kubectl(["delete", "rayjobs.ray.io", submission.id, *self._here])
        return "is deleted: it did not run"

    @property
    def _here(self) -> list[str]:
        return [f"--namespace={self._namespace}"]

    def _names_of(self, output: str) -> list[str]:
        """Those that a job has had: the ConfigMap of a RayJob that was deleted is still there."""
        selector = f"--selector={DIGITS}={output_digits(output)}"
        found = kubectl_json(["get", "rayjobs.ray.io,configmaps", selector, *self._here])
        return [o["metadata"]["name"] for o in found["items"]]

    def _get(self, name: str) -> dict[str, Any]:
        job: dict[str, Any] = kubectl_json(["get", "rayjobs.ray.io", name, *self._here])
        return job

    def _find_head(self, job: dict[str, Any]) -> str | None:
        """The name of the pod that has the driver; None while there is none."""
        cluster = job.get("status", {}).get("rayClusterName")
        if not cluster:
            return None
        pods = kubectl_json(["get", "pods", f"--selector=ray.io/cluster={cluster},ray.io/node-type=head", *self._here])
        running = [pod["metadata"]["name"] for pod in pods["items"] if pod["status"]["phase"] == "Running"]
        return running[0] if running else None

    def _in_head(self, head: str, job: dict[str, Any], verb: str, *options: str) -> list[str]:
        """The arguments of kubectl for `ray job VERB` there."""
        command = ray_job(verb, job["status"]["jobId"], *options)
        return ["exec", head, *self._here, "--container=ray-head", "--", *command]


def ray_job(verb: str, job_id: str, *options: str, address: str = DASHBOARD) -> list[str]:
    """Ray's own command, for the head's pod: there it has address and token, which here may not be reached."""
    return ["ray", "job", verb, f"--address={address}", *options, job_id]


def submission_of(job: dict[str, Any]) -> Submission:
    """A RayJob, as Kubernetes has it, as a Submission."""
    about, status = job["metadata"], job.get("status", {})
    place = status.get("jobDeploymentStatus", "")
    state = JobStatus(status.get("jobStatus") or "PENDING")
    if place in HAS_ENDED and not state.is_terminal():
        state = JobStatus.FAILED
    elif place not in HAS_ENDED and state.is_terminal():  # it is tried again, or KubeRay has yet to look
        state = JobStatus.PENDING
    message = ", ".join(text for text in (place, status.get("reason"), status.get("message")) if text)
    return Submission(
        id=about["name"],
        name=about["annotations"][NAME],
        output=about["annotations"][OUTPUT],
        state=state,
        started_s=datetime.fromisoformat(about["creationTimestamp"]).timestamp(),
        message=message,
        driver_exit_code=None,
    )
