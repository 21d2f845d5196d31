"""The `moray` command: it parses arguments, loads the spec and calls the function that does the work.

Modules that are slow to import are imported where they are used, so that --help answers at once.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moray.batch.runtime.driver_link import DriverLink
from moray.batch.runtime.signals import exit_on_signals
from moray.engine.errors import (
    CheckpointError,
    InputError,
    JobError,
    NodeError,
    OutputError,
    SettingsError,
    SpecError,
    UserError,
)
from moray.engine.text.without_torch import do_without_torch
from moray.jobs.commands import cluster as cluster_cli
from moray.jobs.commands import doctor as doctor_cli
from moray.jobs.commands import submit as submit_cli
from moray.jobs.commands.spec_arguments import Overrides, SpecPath
from moray.jobs.driver.driver_process import run_driver
from moray.jobs.driver.lenient_output import (
    drop_unread_output,
    escape_unknown_characters,
    make_output_lenient,
    open_missing_output,
)

if TYPE_CHECKING:
    from moray.batch.spec import JobSpec

IS_COMMAND = True  # the object in typer's context where main() started the command; None where Python code calls it
ROOT = Path(__file__).resolve().parents[1]
HEADLINES: dict[type[UserError], str] = {
    SpecError: "The job spec is wrong",
    SettingsError: "The settings are wrong",
    CheckpointError: "The model cannot be used",
    InputError: "The input cannot be used",
    NodeError: "This machine cannot run it now",
    OutputError: "The output folder cannot be used",
}

app = typer.Typer(
    help="Batch inference and serving of mixture-of-experts language models on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(submit_cli.commands)
app.add_typer(cluster_cli.commands)
app.add_typer(doctor_cli.commands)

Example = Annotated[
    str,
    typer.Argument(
        metavar="EXAMPLE",
        help="Which example: demo (prompts), chat, score or structured (multiple choice, scored or generated).",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Ray cluster to use: HOST:PORT of its head node, or auto on one of its nodes. Default: RAY_ADDRESS if "
        "set, else a local Ray.",
    ),
]
OutputPath = Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a job.", show_default=False)]


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
    pass


SMALL_MODEL = str(ROOT / "examples" / "tiny-phimoe")
ServedModel = Annotated[str, typer.Option(help="Model: a folder, s3://, gs:// or hf://org/name.")]
ServedDtype = Annotated[
    str, typer.Option(help="Data type of weights and activations: auto, float32, float16 or bfloat16.")
]


@app.command()
def run(
    context: typer.Context,
    spec: SpecPath,
    set_: Overrides = None,
    address: Address = None,
    price: cluster_cli.Price = None,
) -> None:
    """Run a job, or resume it where it stopped.

    Exit codes: 0 succeeded, 1 failed, 2 invalid arguments, spec, model or input.
    """
    _drive(context, lambda link: _run(_load(spec, set_ or (), link), address, link, price))


@app.command()
def plan(
    spec: SpecPath,
    set_: Overrides = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            "--card",
            metavar="MODEL",
            help="GPU model to plan for, e.g. H200. Repeat it, or give all, to compare.",
        ),
    ] = None,
    gpus: Annotated[
        list[int] | None,
        typer.Option(
            "--gpus", metavar="N", help="GPUs of a worker among which the model is split: 1, 2, 4 or 8. Repeatable."
        ),
    ] = None,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Throughput of one worker, if known: generated tokens/s (task score: tokens/s read)."
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="USD per GPU-hour (without GPUs, per worker-hour).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Validate a job and estimate tokens, memory, time and cost, without running it.

    Also shows which rows will fail and which shards are done already.
    """
    from rich.console import Console

    from moray.batch.forecast.job_forecast import ForecastOptions
    from moray.batch.plan.gpus import RAY_NAMES
    from moray.batch.plan.planner import plan_job
    from moray.batch.spec import load_spec
    from moray.jobs.views import plan as plan_view
    from moray.jobs.views import plan_values

    models, numbers = list(RAY_NAMES) if gpu == ["all"] else gpu or [], gpus or []
    options = ForecastOptions(
        models[0] if len(models) == 1 else None,
        gpus=numbers[0] if len(numbers) == 1 else None,
        tokens_per_s=tokens_per_second,
        price=price,
    )
    description = plan_values.describe(plan_job(load_spec(spec, set_ or ())), options, models, numbers)
    if as_json:
        print(json.dumps(description, indent=2))
    else:
        Console().print(plan_view.render(description))


@app.command()
def serve(
    model: ServedModel = SMALL_MODEL,
    dtype: ServedDtype = "auto",
    host: Annotated[
        str, typer.Option(help="Address to listen on. One that other machines reach needs API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    batches: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Offer OpenAI's Batch API, with this folder or bucket for its files."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Set another argument of the endpoint, e.g. max_waiting=64. Repeatable."
        ),
    ] = None,
) -> None:
    """Start an OpenAI-compatible API server and serve until Ctrl-C.

    Without --model it serves the small model of examples/.
    """
    from moray.jobs.commands.serve import read_args, run_endpoint

    run_endpoint(read_args(model, dtype, set_ or (), batches), host, port)


@app.command()
def batch(
    input_: Annotated[
        str, typer.Argument(metavar="IN", help="Requests: JSONL as for OpenAI's Batch API.", show_default=False)
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="JSONL file to write.")],
    model: ServedModel = SMALL_MODEL,
    dtype: ServedDtype = "auto",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set another argument, as of moray serve. Repeatable."),
    ] = None,
) -> None:
    """Answer a file of requests without an endpoint. Run again after an interruption, it goes on.

    Exit codes: 0 all requests have a line in OUT, 1 failed, or every request was refused, 2 invalid arguments or input.
    """
    from moray.jobs.commands.batch import run_batch
    from moray.jobs.commands.serve import read_args

    make_output_lenient()
    sys.exit(run_batch(read_args(model, dtype, set_ or ()), input_, output))


@app.command()
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Checkpoint of bfloat16, float16 or float32 weights, as model.path.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write, which must not exist.")],
    format_: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="What the weights become: int8, int4 or fp8.")
    ] = "int8",
) -> None:
    """Write a checkpoint with quantized weights, which loads faster than one that is quantized on load.

    Its layout is that of compressed-tensors. Answers are bit by bit those of model.quantization on the original.
    """
    from moray.jobs.commands.quantize import quantize_model

    quantize_model(model, out, format_)


@app.command()
def retry(
    context: typer.Context,
    spec: SpecPath,
    code: Annotated[
        list[str] | None,
        typer.Option(metavar="CODE", help="Retry only rows that failed with this error code. Repeatable."),
    ] = None,
    set_: Overrides = None,
    address: Address = None,
) -> None:
    """Run only the failed rows of a finished job again. Limits and engine settings may differ from the first run's."""

    def drive(link: DriverLink) -> int:
        from moray.batch.runtime.driver import retry_job
        from moray.jobs.views.progress_bar import ProgressDisplay

        with ProgressDisplay() as display:
            job = _load(spec, set_ or (), link)
            return retry_job(job, code or (), address=address, display=display, link=link).exit_code

    _drive(context, drive)


@app.command()
def verify(
    out: OutputPath,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check, from the files alone, that the output has every input row exactly once.

    Exit codes: 0 complete, 1 not complete, 2 invalid arguments.
    """
    from moray.batch.output.verify import verify as verify_folder
    from moray.jobs.views import verification as verify_view

    found = verify_folder(out)
    print(json.dumps(found.to_json(), indent=2) if as_json else verify_view.render(out, found))
    sys.exit(0 if found.closes else 1)


@app.command()
def export(
    out: OutputPath,
    target: Annotated[
        str,
        typer.Argument(metavar="FILE", help="File to write: *.jsonl or *.ndjson, also with .gz or .zst after it."),
    ],
    openai: Annotated[bool, typer.Option("--openai", help="Write the lines of OpenAI's Batch API.")] = False,
    partial: Annotated[bool, typer.Option("--partial", help="Export a job of which rows are not done.")] = False,
) -> None:
    """Write a job's rows into one file of JSON lines, in the order of its input. Rows with errors are in it."""
    from moray.batch.export.export import export as export_job
    from moray.batch.units import count

    found = export_job(out, target, as_openai=openai, partial=partial)
    pending = f"; {count(found.pending, 'row')} of the input not done" if found.pending else ""
    print(f"{target}: {count(found.lines, 'line')}{pending}")


@app.command()
def report(
    out: OutputPath,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="File to write. Default: OUT/_job/report.html.")
    ] = None,
) -> None:
    """Write a job's HTML report from its output folder. Every run writes one when it ends."""
    from moray.batch.report import write_report

    print(write_report(out, output))


@app.command()
def demo(context: typer.Context, example: Example = "demo", set_: Overrides = None) -> None:
    """Run an example job with the small model of examples/ and show some answers."""
    os.chdir(ROOT)

    def drive(link: DriverLink) -> int:
        spec = _load(Path(f"examples/{example}.yaml"), set_ or (), link)
        code = _run(spec, None, link)
        if code == 0:
            from rich.console import Console

            from moray.jobs.views import answers as answers_view

            Console().print(answers_view.render(spec, answers_view.read_answers(spec)))
        return code

    _drive(context, drive)


def _drive(context: typer.Context, call: Callable[[DriverLink], int]) -> None:
    """Run the driver and exit with its exit code.

    The installed command runs it in a child process, which is started again when it dies. Where Python code calls the
    command, this process is the driver.
    """
    if not context.find_root().obj:
        sys.exit(call(DriverLink()))
    make_output_lenient()
    sys.exit(run_driver(call))


def _load(path: Path, overrides: Sequence[str], link: DriverLink) -> "JobSpec":
    """Load the job's spec. A driver that was started again gets the spec it had, even if the file has changed since."""
    from moray.batch.spec import JobSpec, load_spec

    return load_spec(path, overrides) if link.restart is None else JobSpec.from_yaml(link.restart.spec)


def _run(spec: "JobSpec", address: str | None, link: DriverLink, price: float | None = None) -> int:
    from moray.batch.runtime.driver import run_job
    from moray.jobs.views.progress_bar import ProgressDisplay

    with ProgressDisplay(price=price) as display:
        return run_job(spec, address=address, display=display, price=price, link=link).exit_code


def explain(error: UserError) -> str:
    """Format a user's mistake: a headline, then each problem on a line of its own."""
    headline = next((text for kind, text in HEADLINES.items() if isinstance(error, kind)), "That cannot be done")
    return "\n".join([f"{headline}:", *(f"  {line}" for line in str(error).splitlines())])


def main() -> None:
    """Run the command line. A user's mistake exits with 2, a failed job with 1, both without a stack trace."""
    exit_on_signals()
    do_without_torch()
    open_missing_output()
    escape_unknown_characters()
    try:
        app(obj=IS_COMMAND)
    except UserError as error:
        print(explain(error), file=sys.stderr)
        sys.exit(2)
    except JobError as error:
        print(f"The job failed: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        drop_unread_output()


if __name__ == "__main__":
    main()
