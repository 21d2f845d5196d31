"""The commands that talk to a Ray cluster: submit, status, logs, cancel, list."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from engine.errors import UserError

if TYPE_CHECKING:
    from jobs.cluster import Cluster
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
Address = Annotated[str, _ADDRESS]
MaybeAddress = Annotated[str | None, _ADDRESS]
Target = Annotated[
    str, typer.Argument(metavar="JOB", help="A job's name, output folder or submission id.", show_default=False)
]
Price = Annotated[
    float | None,
    typer.Option(metavar="USD", min=0.0, help="Of a GPU for an hour (without GPUs, of a worker): show money."),
]


@commands.command()
def submit(
    spec: SpecPath,
    address: Address,
    set_: Overrides = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return as soon as the cluster has the job.")] = False,
    installed: Annotated[
        bool, typer.Option("--installed", help="Use the moray of the cluster's image instead of sending this one.")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="A variable for the job; without a value, the one it has here."),
    ] = None,
) -> None:
    """Run a job on a Ray cluster, or continue it. Without --detach, exit codes are those of run."""
    from batch.spec import load_spec
    from jobs.cluster import Cluster
    from jobs.package import ENTRYPOINT, check_paths, stage

    job = load_spec(spec, set_ or ())
    check_paths(job)
    variables = {STOP_WAIT: str(STOP_WAIT_S)} | dict(map(read_variable, env or ()))
    cluster = Cluster(address)
    with TemporaryDirectory(prefix="moray-") as folder:
        stage(job, Path(folder), with_code=not installed)
        submission = cluster.submit(job.name, job.output.path, ENTRYPOINT, Path(folder), variables)
    print(f"Submitted {submission.id} to {cluster.address}; output: {submission.output}", flush=True)
    if not detach:
        sys.exit(_follow(cluster, submission))


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
    text = status_view.read(output)
    if text is None and submission is None:
        raise UserError(f"{job} is no job's output folder; to find a job by its name, give the cluster's --address")
    if watch:
        if as_json:
            raise UserError("--json prints status.json once; --watch draws it again and again. Give one of them.")
        sys.exit(_watch(output, price, ask))
    if as_json:
        print("null" if text is None else text)
        return
    if submission is not None:
        print(status_view.draw_submission(submission))
    print(
        "  no counts yet: its output folder holds none, or is out of reach"
        if text is None
        else status_view.draw(text, price)
    )


@commands.command()
def logs(
    job: Target,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
) -> None:
    """What a job wrote on the cluster. With --follow, exit codes are those of run."""
    from jobs.cluster import Cluster

    cluster = Cluster(address)
    submission = cluster.find(job)
    if follow:
        sys.exit(_follow(cluster, submission))
    print(cluster.logs(submission.id), end="")


@commands.command()
def cancel(job: Target, address: Address) -> None:
    """Stop a job: what is in flight is finished and kept. Submitting it again continues it."""
    from jobs.cluster import Cluster

    cluster = Cluster(address)
    submission = cluster.find(job)
    if submission.is_over:
        print(f"{submission.id} is over already: {submission.state}")
        return
    cluster.stop(submission.id)
    print(f"Stopping {submission.id}: shards in flight are finished and kept", flush=True)
    print(f"{submission.id} {cluster.wait(submission.id).state}")


@commands.command("list")
def list_jobs(address: Address) -> None:
    """The jobs that were submitted to a cluster, with their rows."""
    from rich.console import Console

    from jobs import status_view
    from jobs.cluster import Cluster

    Console().print(status_view.draw_list(Cluster(address).submissions()))


def read_variable(text: str) -> tuple[str, str]:
    """NAME=VALUE, or NAME with the value that it has here. Raises UserError where it has none."""
    name, equals, value = text.partition("=")
    if not equals and name not in os.environ:
        raise UserError(f"--env {name}: there is no such variable here; write {name}=VALUE")
    return name, value if equals else os.environ[name]


def _watch(output: str, price: float | None, ask: "Callable[[], Submission] | None") -> int:
    from jobs.display import Display
    from jobs.watch import watch

    with Display(price=price) as display:
        return watch(output, display, ask)


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
