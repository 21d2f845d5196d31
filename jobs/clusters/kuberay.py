"""KubeRay: submit and manage jobs as RayJobs of a Kubernetes namespace, through kubectl, as RayCluster does on Ray."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from ray.job_submission import JobStatus

from moray.batch.spec import JobSpec
from moray.engine.errors import UserError
from moray.jobs.clusters.kubectl import kubectl, kubectl_json, kubectl_shown, render_overlay
from moray.jobs.clusters.rayjob import (
    DIGITS_LABEL,
    NAME_ANNOTATION,
    OUTPUT_ANNOTATION,
    check_images,
    make_rayjob,
    to_yaml,
)
from moray.jobs.clusters.submission import Submission, next_label, output_digits, select

DASHBOARD = "http://127.0.0.1:8265"  # address of the dashboard in the head's pod
HAS_ENDED = ("Complete", "Failed", "ValidationFailed")  # final values of a RayJob's jobDeploymentStatus


def render_job(
    spec: JobSpec, overlay: str, namespace: str, image: str | None, before: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return all objects of a submission.

    before: names of earlier submissions of this job

    Raises UserError where the overlay or the spec does not fit.
    """
    name = next_label(spec.name, spec.output.path, before)
    return make_rayjob(render_overlay(overlay), spec, name, namespace=namespace, image=image)


class KubeRay:
    """Submits, finds and stops the RayJobs of moray in a namespace."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def submissions(self) -> list[Submission]:
        """Return moray's submissions, the first one first."""
        found = kubectl_json(["get", "rayjobs.ray.io", "--selector=app.kubernetes.io/name=moray", *self._here])
        ours = [o for o in found["items"] if OUTPUT_ANNOTATION in o["metadata"].get("annotations", {})]
        return [submission_of(o) for o in sorted(ours, key=lambda o: o["metadata"]["creationTimestamp"])]

    def find(self, target: str) -> Submission:
        """Return the latest submission of a job, by its name, output folder or submission id. Raises UserError."""
        return select(self.submissions(), target, f"namespace {self._namespace}")

    def submit(self, spec: JobSpec, overlay: str, image: str | None) -> Submission:
        """Create a job's RayJob and ConfigMap, which must be new, and apply the objects that jobs share.

        Raises UserError where a RayJob with this output folder has not ended.
        """
        check_images(render_job(spec, overlay, self._namespace, image))  # before the cluster is contacted
        same = [one for one in self.submissions() if one.output == spec.output.path.rstrip("/")]
        if running := [one for one in same if not one.is_over]:
            raise UserError(
                f"{running[-1].output} is being written by {running[-1].id}. Follow it: moray logs {running[-1].id} "
                f"--kuberay; stop it: moray cancel {running[-1].id} --kuberay"
            )
        objects = render_job(spec, overlay, self._namespace, image, self._names_of(spec.output.path))
        own = [o for o in objects if OUTPUT_ANNOTATION in o["metadata"].get("annotations", {})]
        kubectl(["apply", "--filename=-"], to_yaml([o for o in objects if o not in own]))
        kubectl(["create", "--filename=-"], to_yaml(own))
        return self.find(own[0]["metadata"]["name"])

    def show_logs(self, submission: Submission, *, follow: bool) -> int:
        """Print the job's log on the terminal and return kubectl's exit code. Raises UserError where no head runs."""
        job = self._get(submission.id)
        head = self._find_head(job)
        if head is None:
            raise UserError(
                f"{submission.id} has no running head pod ({submission.message or 'no cluster'}); for its progress: "
                f"moray status {submission.output}"
            )
        return kubectl_shown(self._in_head(head, job, "logs", *(["--follow"] if follow else [])))

    def stop(self, submission: Submission) -> str:
        """Stop a job after its shards in flight, and wait for that; delete one that does not run. Return the outcome.

        It stops the job in Ray, not the RayJob: Kubernetes deletes the pods of a RayJob that is deleted or suspended at
        once.
        """
        job = self._get(submission.id)
        head = self._find_head(job)
        if head is not None and job["status"].get("jobStatus"):
            kubectl(self._in_head(head, job, "stop"))  # returns when the job has ended
            return f"has ended: moray status {submission.output}"
        kubectl(["delete", "rayjobs.ray.io", submission.id, *self._here])
        return "is deleted: it did not run"

    @property
    def _here(self) -> list[str]:
        return [f"--namespace={self._namespace}"]

    def _names_of(self, output: str) -> list[str]:
        """Return the names of a job's submissions so far. The ConfigMap of a RayJob that was deleted still exists."""
        selector = f"--selector={DIGITS_LABEL}={output_digits(output)}"
        found = kubectl_json(["get", "rayjobs.ray.io,configmaps", selector, *self._here])
        return [o["metadata"]["name"] for o in found["items"]]

    def _get(self, name: str) -> dict[str, Any]:
        job: dict[str, Any] = kubectl_json(["get", "rayjobs.ray.io", name, *self._here])
        return job

    def _find_head(self, job: dict[str, Any]) -> str | None:
        """Return the name of the running head pod, which has the driver; None while there is none."""
        cluster = job.get("status", {}).get("rayClusterName")
        if not cluster:
            return None
        pods = kubectl_json(["get", "pods", f"--selector=ray.io/cluster={cluster},ray.io/node-type=head", *self._here])
        running = [pod["metadata"]["name"] for pod in pods["items"] if pod["status"]["phase"] == "Running"]
        return running[0] if running else None

    def _in_head(self, head: str, job: dict[str, Any], verb: str, *options: str) -> list[str]:
        """Return the arguments of kubectl that run `ray job VERB` in the head pod."""
        command = ray_job(verb, job["status"]["jobId"], *options)
        return ["exec", head, *self._here, "--container=ray-head", "--", *command]


def ray_job(verb: str, job_id: str, *options: str, address: str = DASHBOARD) -> list[str]:
    """Return Ray's command for the head pod, where it has the address and the token; from here it may have neither."""
    return ["ray", "job", verb, f"--address={address}", *options, job_id]


def submission_of(job: dict[str, Any]) -> Submission:
    """Convert a RayJob from Kubernetes to a Submission."""
    metadata, status = job["metadata"], job.get("status", {})
    deployment_status = status.get("jobDeploymentStatus", "")
    state = JobStatus(status.get("jobStatus") or "PENDING")
    if deployment_status in HAS_ENDED and not state.is_terminal():
        state = JobStatus.FAILED
    elif deployment_status not in HAS_ENDED and state.is_terminal():  # it is retried, or KubeRay has not noticed yet
        state = JobStatus.PENDING
    message = ", ".join(text for text in (deployment_status, status.get("reason"), status.get("message")) if text)
    return Submission(
        id=metadata["name"],
        name=metadata["annotations"][NAME_ANNOTATION],
        output=metadata["annotations"][OUTPUT_ANNOTATION],
        state=state,
        started_s=datetime.fromisoformat(metadata["creationTimestamp"]).timestamp(),
        message=message,
        driver_exit_code=None,
    )
