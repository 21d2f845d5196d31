"""The commands that ask a Ray cluster, or Kubernetes, about its jobs: status, logs, cancel, list."""

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from engine.errors import UserError

if TYPE_CHECKING:
    from jobs.cluster import Cluster
    from jobs.kuberay import KubeRay
    from jobs.submission import Submission

commands = typer.Typer()

_ADDRESS = typer.Option(
    metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, such as http://head:8265."
)
MaybeAddress = Annotated[str | None, _ADDRESS]
OnKubernetes = Annotated[bool, typer.Option("--kuberay", help="On Kubernetes, as a RayJob, through your kubectl.")]
Namespace = Annotated[str, typer.Option(metavar="NAME", help="With --kuberay: moray's namespace.")]
Target = Annotated[
    str, typer.Argument(metavar="JOB", help="A job's name, output folder or submission id.", show_default=False)
]
Price = Annotated[
    float | None,
    typer.Option(metavar="USD", min=0.0, help="Of a GPU for an hour (without GPUs, of a worker): show money."),
]


@commands.command()
def status(
    job: Target,
    address: MaybeAddress = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print status.json as it is.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on until the job is over; exit codes are those of run.")
    ] = False,
    price: Price = None,
) -> None:
    """How a job is: the cluster's word where an address is given, and the figures in its output folder."""
    from jobs import status_view

    submission, ask = None, None
    if address is not None and not status_view.has_status(job):
        from jobs.cluster import Cluster

        cluster = Cluster(address)
        submission = cluster.find(job)
        ask = partial(cluster.get, submission.id)
    output = job if submission is None else submission.output
    found = status_view.read(output)
    if found is None and submission is None:
        raise UserError(status_view.explain_none(output))
    if watch:
        if as_json:
            raise UserError("--json prints status.json once; --watch draws it again and again. Give one of them.")
        sys.exit(_watch(output, price, ask))
    if as_json:
        print("null" if found is None else status_view.read_json(output))
        return
    if submission is not None:
        print(status_view.draw_submission(submission))
    print(
        "  no counts yet: its output folder holds none, or is out of reach"
        if found is None
        else status_view.draw(*found, price)
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

    cluster = Cluster(need_address(address))
    submission = cluster.find(job)
    if follow:
        sys.exit(follow_log(cluster, submission))
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

    return Cluster(need_address(address))


def need_address(address: str | None) -> str:
    if address is None:
        raise UserError("where? Give the Ray cluster's --address (or RAY_API_SERVER_ADDRESS), or --kuberay")
    return address


def _watch(output: str, price: float | None, ask: "Callable[[], Submission] | None") -> int:
    from jobs.display import Display
    from jobs.watch import watch

    with Display(price=price) as display:
        return watch(output, display, ask)


def follow_log(cluster: "Cluster", submission: "Submission") -> int:
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
