"""The `moray` command: arguments -> spec -> call. What is heavy to import is imported where it is needed."""

import json
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.environment import check_environment
from engine.errors import CheckpointError, InputError, JobError, OutputError, SpecError, UserError
from jobs import cluster_cli, submit_cli

if TYPE_CHECKING:
    from batch.spec import JobSpec

ROOT = Path(__file__).resolve().parents[1]
HEADLINES: dict[type[UserError], str] = {
    SpecError: "The job spec is wrong",
    CheckpointError: "The model cannot be used",
    InputError: "The input cannot be used",
    OutputError: "The output folder cannot be used",
}

app = typer.Typer(
    help="Batch inference of mixture-of-experts language models on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(submit_cli.commands)
app.add_typer(cluster_cli.commands)

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The job spec, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a field of the spec, such as sampling.temperature=0.7."),
]
Example = Annotated[str, typer.Argument(metavar="EXAMPLE", help="demo (prompts), chat or score (multiple choice).")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help="A Ray cluster: HOST:PORT of its head, auto on a node; else, Ray starts here."
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"moray {version('moray')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    check_environment()


@app.command()
def run(spec: SpecPath, set_: Overrides = None, address: Address = None, price: cluster_cli.Price = None) -> None:
    """Run a job, or continue it. Exit code 0: succeeded, 1: failed, 2: a mistake in what was given."""
    from batch.spec import load_spec

    sys.exit(_run(load_spec(spec, set_ or ()), address, price))


@app.command()
def plan(
    spec: SpecPath,
    set_: Overrides = None,
    card: Annotated[
        list[str] | None,
        typer.Option(metavar="CARD", help="A GPU to plan for, such as H200; several, or all, are compared."),
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Generated (task score: read) by one worker, where you know it.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="USD for an hour of a card, or of a worker.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a run would do and take: rows, tokens, memory, time, price, what is done already. Runs nothing."""
    from rich.console import Console

    from batch.forecast.of_job import Wanted
    from batch.placement.cards import CARDS
    from batch.planning.planner import plan_job
    from batch.spec import load_spec
    from jobs import plan_values, plan_view

    cards = list(CARDS) if card == ["all"] else card or []
    wanted = Wanted(cards[0] if len(cards) == 1 else None, tokens_per_s=tokens_per_second, price=price)
    description = plan_values.describe(plan_job(load_spec(spec, set_ or ())), wanted, cards)
    if as_json:
        print(json.dumps(description, indent=2))
    else:
        Console().print(plan_view.draw(description))


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="Folder, s3://, gs:// or hf://org/name.")] = str(
        ROOT / "examples" / "tiny-phimoe"
    ),
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.")] = 8000,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Set any other argument of the endpoint, such as max_waiting=64."
        ),
    ] = None,
) -> None:
    """Serve a model in real time, with OpenAI's API, until Ctrl-C. Without --model: the small one of examples/."""
    from jobs.endpoint import read_args, run_endpoint

    run_endpoint(read_args(model, dtype, set_ or ()), host, port)


@app.command()
def retry(
    spec: SpecPath,
    code: Annotated[
        list[str] | None,
        typer.Option(metavar="CODE", help="Only rows that failed with this error code; may be repeated."),
    ] = None,
    set_: Overrides = None,
    address: Address = None,
) -> None:
    """Run the failed rows of a finished job again, and nothing else. Limits and engine settings may differ."""
    from batch.driver import retry_job
    from batch.spec import load_spec
    from jobs.display import Display

    with Display() as display:
        result = retry_job(load_spec(spec, set_ or ()), code or (), address=address, display=display)
    sys.exit(result.exit_code)


@app.command()
def verify(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A job's output folder.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Prove from the files alone that every input row is there exactly once. Exit code 1: it is not so."""
    from batch.verify import verify as verify_folder
    from jobs import verify_view

    found = verify_folder(out)
    print(json.dumps(found.to_json(), indent=2) if as_json else verify_view.draw(out, found))
    sys.exit(0 if found.closes else 1)


@app.command()
def report(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A job's output folder.", show_default=False)],
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where to write it; without it, OUT/_job/report.html.")
    ] = None,
) -> None:
    """Write the report of a job, one HTML file, from the job's files alone. Every run writes one when it ends."""
    from batch.report import write_report

    print(write_report(out, output))


@app.command()
def demo(example: Example = "demo", set_: Overrides = None) -> None:
    """Run a job of examples/, over the small model, and show some of the answers."""
    from batch.spec import load_spec

    os.chdir(ROOT)
    spec = load_spec(f"examples/{example}.yaml", set_ or ())
    code = _run(spec, None)
    if code == 0:
        from rich.console import Console

        from jobs import answers_view

        Console().print(answers_view.draw(spec, answers_view.read_answers(spec)))
    sys.exit(code)


def _run(spec: "JobSpec", address: str | None, price: float | None = None) -> int:
    from batch.driver import run_job
    from jobs.display import Display

    with Display(price=price) as display:
        result = run_job(spec, address=address, display=display, price=price)
    return result.exit_code


def explain(error: UserError) -> str:
    """The message with a headline; each problem on a line of its own."""
    headline = next((text for kind, text in HEADLINES.items() if isinstance(error, kind)), "That cannot be done")
    return "\n".join([f"{headline}:", *(f"  {line}" for line in str(error).splitlines())])


def main() -> None:
    """Entry point: a user's mistake ends with exit code 2, a failed job with 1, both without a stack trace."""
    for number in (signal.SIGINT, signal.SIGTERM):  # until a job runs and takes them over
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    try:
        app()
    except UserError as error:
        print(explain(error), file=sys.stderr)
        sys.exit(2)
    except JobError as error:
        print(f"The job failed: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
