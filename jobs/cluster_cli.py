"""The commands that talk to a Ray cluster, or to Kubernetes: submit, status, logs, cancel, list."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from engine.errors import UserError

if TYPE_CHECKING:
    from batch.spec import JobSpec
    from jobs.cluster import Cluster
    from jobs.kuberay import KubeRay
    from jobs.submission import Submission

# Ray kills a job that was told to stop after 3 s, or after this: a shard in flight takes its time to commit.
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_S = 600

commands = typer.Typer()

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The job spec, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a field of the spec, as for run.")
]
_ADDRESS = typer.Option(
    metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, such as http://head:8265."
)
MaybeAddress = Annotated[str | None, _ADDRESS]
OnKubernetes = Annotated[bool, typer.Option("--kuberay", help="On Kubernetes, as a RayJob, through your kubectl.")]
Namespace = Annotated[str, typer.Option(metavar="NAME", help="With --kuberay: moray's namespace.")]
Target = Annotated[
    str, typer.Argument(metavar="JOB", help="A job's name, output folder or submission id.", show_default=False)
]


@commands.command()
def submit(
    spec: SpecPath,
    address: MaybeAddress = None,
    set_: Overrides = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return as soon as the cluster has the job.")] = False,
    installed: Annotated[
        bool, typer.Option("--installed", help="Use the moray of the cluster's image instead of sending this one.")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="A variable for the job; without a value, the one it has here."),
    ] = None,
    kuberay: OnKubernetes = False,
    overlay: Annotated[
        str, typer.Option(metavar="NAME", help="With --kuberay: a cloud of k8s/overlays, or a folder.")
    ] = "aks",
    namespace: Namespace = "moray",
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="With --kuberay: REGISTRY/moray, in place of the overlay's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --kuberay: print what would be applied, and ask no cluster.")
    ] = False,
) -> None:
    """Run a job on a Ray cluster, or continue it. Without --detach, exit codes are those of run. With --kuberay it
    returns as soon as Kubernetes has the job, which runs the moray of the image."""
    from batch.spec import load_spec

    job = load_spec(spec, set_ or ())
    if kuberay:
        if env:
            raise UserError("--env is for --address; on Kubernetes variables come from the Secret moray-store")
        return _submit_to_kubernetes(job, overlay, namespace, image, dry_run=dry_run)
    if dry_run:
        raise UserError("--dry-run is for --kuberay; what a job would do is said by: moray plan SPEC")
    _submit_to_ray(job, _address(address), env or (), detach=detach, installed=installed)


def _submit_to_ray(job: "JobSpec", address: str, env: Sequence[str], *, detach: bool, installed: bool) -> None:
    from jobs.cluster import Cluster
    from jobs.package import ENTRYPOINT, check_paths, stage

    check_paths(job)
    variables = {STOP_WAIT: str(STOP_WAIT_S)} | dict(map(read_variable, env))
    cluster = Cluster(address)
    with TemporaryDirectory(prefix="moray-") as folder:
        stage(job, Path(folder), with_code=not installed)
        submission = cluster.submit(job.name, job.output.path, ENTRYPOINT, Path(folder), variables)
    print(f"Submitted {submission.id} to {cluster.address}; output: {submission.output}", flush=True)
    if not detach:
        sys.exit(_follow(cluster, submission))


def _submit_to_kubernetes(job: "JobSpec", overlay: str, namespace: str, image: str | None, *, dry_run: bool) -> None:
    from jobs.kuberay import KubeRay, render_job
    from jobs.rayjob import to_yaml

    if dry_run:
        print(to_yaml(render_job(job, overlay, namespace, image)), end="")
        return
    submission = KubeRay(namespace).submit(job, overlay, image)
    print(f"Created RayJob {submission.id} in namespace {namespace}; output: {submission.output}")


@commands.command()
def status(
    job: Target,
    address: MaybeAddress = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print status.json as it is.")] = False,
) -> None:
    """How a job is: the cluster's word where an address is given, and the counts of its output folder."""
    from jobs import status_view

    submission = None
    if address is not None and not status_view.has_status(job):
        from jobs.cluster import Cluster

        submission = Cluster(address).find(job)
    output = job if submission is None else submission.output
    text = status_view.read(output)
    if text is None and submission is None:
        raise UserError(f"{job} is no job's output folder; to find a job by its name, give the cluster's --address")
    if as_json:
        print("null" if text is None else text)
        return
    if submission is not None:
        print(status_view.draw_submission(submission))
    print(
        "  no counts yet: its output folder holds none, or is out of reach" if text is None else status_view.draw(text)
    )


@commands.command()
def logs(
    job: Target,
    address: MaybeAddress = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    kuberay: OnKubernetes = False,
    namespace: Namespace = "moray",
) -> None:
    """What a job wrote on the cluster. With --follow, exit codes are those of run."""
    if kuberay:
        from jobs.kuberay import KubeRay

        kubernetes = KubeRay(namespace)
        sys.exit(kubernetes.show_logs(kubernetes.find(job), follow=follow))

    from jobs.cluster import Cluster

    cluster = Cluster(_address(address))
    submission = cluster.find(job)
    if follow:
        sys.exit(_follow(cluster, submission))
    print(cluster.logs(submission.id), end="")


@commands.command()
def cancel(
    job: Target, address: MaybeAddress = None, kuberay: OnKubernetes = False, namespace: Namespace = "moray"
) -> None:
    """Stop a job: what is in flight is finished and kept. Submitting it again continues it."""
    cluster = _connect(address, kuberay, namespace)
    submission = cluster.find(job)
    if submission.is_over:
        print(f"{submission.id} is over already: {submission.state}")
        return
    print(f"Stopping {submission.id}: shards in flight are finished and kept", flush=True)
    print(f"{submission.id} {cluster.stop(submission)}")


@commands.command("list")
def list_jobs(address: MaybeAddress = None, kuberay: OnKubernetes = False, namespace: Namespace = "moray") -> None:
    """The jobs that were submitted to a cluster, with their rows."""
    from rich.console import Console

    from jobs import status_view

    Console().print(status_view.draw_list(_connect(address, kuberay, namespace).submissions()))


def _connect(address: str | None, kuberay: bool, namespace: str) -> "Cluster | KubeRay":
    if kuberay:
        from jobs.kuberay import KubeRay

        return KubeRay(namespace)
    from jobs.cluster import Cluster

    return Cluster(_address(address))


def _address(address: str | None) -> str:
    if address is None:
        raise UserError("where? Give the Ray cluster's --address (or RAY_API_SERVER_ADDRESS), or --kuberay")
    return address


def read_variable(text: str) -> tuple[str, str]:
    """NAME=VALUE, or NAME with the value that it has here. Raises UserError where it has none."""
    name, equals, value = text.partition("=")
    if not equals and name not in os.environ:
        raise UserError(f"--env {name}: there is no such variable here; write {name}=VALUE")
    return name, value if equals else os.environ[name]


def _follow(cluster: "Cluster", submission: "Submission") -> int:
    """Show the log until the job is over; being interrupted leaves the job alone."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        end = cluster.follow(submission.id, write)
    except SystemExit:
        print(
            f"\n{submission.id} goes on. See it: moray logs -f {submission.id}; stop it: moray cancel {submission.id}",
            file=sys.stderr,
        )
        raise
    if end.driver_exit_code is None and end.message:
        print(f"{end.id} {end.state}: {end.message}", file=sys.stderr)
    return end.exit_code
