"""`moray status`, `logs`, `cancel` and `list`: the commands about jobs on a Ray cluster or on Kubernetes."""

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from moray.engine.errors import UserError

if TYPE_CHECKING:
    from moray.jobs.clusters.kuberay import KubeRay
    from moray.jobs.clusters.ray_jobs import RayCluster
    from moray.jobs.clusters.submission import Submission

commands = typer.Typer()

_ADDRESS = typer.Option(
    metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="URL of the Ray cluster's dashboard, e.g. http://head:8265."
)
MaybeAddress = Annotated[str | None, _ADDRESS]
OnKubernetes = Annotated[
    bool, typer.Option("--kuberay", help="Use Kubernetes, where a job is a RayJob, through your kubectl.")
]
Namespace = Annotated[str, typer.Option(metavar="NAME", help="Kubernetes namespace, with --kuberay.")]
Target = Annotated[
    str, typer.Argument(metavar="JOB", help="Name, output folder or submission id of a job.", show_default=False)
]
Price = Annotated[
    float | None,
    typer.Option(metavar="USD", min=0.0, help="USD per GPU-hour (without GPUs, per worker-hour): show the cost."),
]


@commands.command()
def status(
    job: Target,
    address: MaybeAddress = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the job's status.json.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Watch until the job ends, and exit with its exit code.")
    ] = False,
    price: Price = None,
) -> None:
    """Show the state and progress of a job, from its output folder and, with --address, from the cluster."""
    from moray.jobs.views import status as status_view
    from moray.jobs.views.status import explain_silence

    submission, ask = None, None
    if address is not None and not status_view.has_status(job):
        from moray.jobs.clusters.ray_jobs import RayCluster

        cluster = RayCluster(address)
        submission = cluster.find(job)
        ask = partial(cluster.get, submission.id)
    output = job if submission is None else submission.output
    found = status_view.read(output)
    if found is None and submission is None:
        raise UserError(status_view.explain_missing_status(output))
    if watch:
        if as_json:
            raise UserError("--json prints status.json once, --watch updates until the job ends. Give one of them.")
        sys.exit(_watch(output, price, ask))
    if as_json:
        print("null" if found is None else status_view.read_json(output))
        if found is not None and not found[0].state.is_final and (silence := explain_silence(output, found[1])):
            print(silence, file=sys.stderr)
        return
    if submission is not None:
        print(status_view.format_submission(submission))
    print(
        "  no progress yet: the output folder has no status, or cannot be read from here"
        if found is None
        else status_view.format_status(*found, price, output=output)
    )


@commands.command()
def logs(
    job: Target,
    address: MaybeAddress = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stream the log until the job ends, and exit with its exit code.")
    ] = False,
    kuberay: OnKubernetes = False,
    namespace: Namespace = "moray",
) -> None:
    """Print the log of a job on a cluster."""
    if kuberay:
        from moray.jobs.clusters.kuberay import KubeRay

        kubernetes = KubeRay(namespace)
        sys.exit(kubernetes.show_logs(kubernetes.find(job), follow=follow))

    from moray.jobs.clusters.ray_jobs import RayCluster

    cluster = RayCluster(require_address(address))
    submission = cluster.find(job)
    if follow:
        sys.exit(follow_log(cluster, submission))
    print(cluster.logs(submission.id), end="")


@commands.command()
def cancel(
    job: Target, address: MaybeAddress = None, kuberay: OnKubernetes = False, namespace: Namespace = "moray"
) -> None:
    """Stop a job on a cluster. Shards in flight are finished and kept; submit the job again to resume it."""
    cluster = _connect(address, kuberay, namespace)
    submission = cluster.find(job)
    if submission.is_over:
        print(f"{submission.id} is over already: {submission.state}")
        return
    print(f"Stopping {submission.id}: shards in flight are finished and kept", flush=True)
    print(f"{submission.id} {cluster.stop(submission)}")


@commands.command("list")
def list_jobs(address: MaybeAddress = None, kuberay: OnKubernetes = False, namespace: Namespace = "moray") -> None:
    """List the jobs that were submitted to a cluster, with their progress."""
    from rich.console import Console

    from moray.jobs.views import status as status_view

    Console().print(status_view.submissions_table(_connect(address, kuberay, namespace).submissions()))


def _connect(address: str | None, kuberay: bool, namespace: str) -> "RayCluster | KubeRay":
    if kuberay:
        from moray.jobs.clusters.kuberay import KubeRay

        return KubeRay(namespace)
    from moray.jobs.clusters.ray_jobs import RayCluster

    return RayCluster(require_address(address))


def require_address(address: str | None) -> str:
    """Return the cluster's address. Raises UserError where none was given."""
    if address is None:
        raise UserError("no cluster given: set the Ray cluster's --address (or RAY_API_SERVER_ADDRESS), or --kuberay")
    return address


def _watch(output: str, price: float | None, ask: "Callable[[], Submission] | None") -> int:
    from moray.jobs.views.progress_bar import ProgressDisplay
    from moray.jobs.views.watch import watch

    with ProgressDisplay(price=price) as display:
        return watch(output, display, ask)


def follow_log(cluster: "RayCluster", submission: "Submission") -> int:
    """Print the log until the job is over, and return the job's exit code. An interrupt does not stop the job."""

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        end = cluster.follow(submission.id, write)
    except SystemExit:
        print(
            f"\n{submission.id} is still running. Follow it: moray logs -f {submission.id}; "
            f"stop it: moray cancel {submission.id}",
            file=sys.stderr,
        )
        raise
    if end.driver_exit_code is None and end.message:
        print(f"{end.id} {end.state}: {end.message}", file=sys.stderr)
    return end.exit_code
