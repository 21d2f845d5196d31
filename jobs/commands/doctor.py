"""`moray doctor`: check the machine, and what a job needs of it."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moray.engine.errors import UserError
from moray.jobs.commands.spec_arguments import Overrides

if TYPE_CHECKING:
    from moray.jobs.doctor.finding import Subject

commands = typer.Typer()


@commands.command()
def doctor(
    spec: Annotated[
        Path | None,
        typer.Argument(metavar="[SPEC]", help="Job spec: also check what this job needs.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Also check this model: a folder, s3://, gs:// or hf://org/name."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Ray cluster to check. Default: RAY_ADDRESS if set.")
    ] = None,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check that this machine can run moray and, with SPEC or --model, a job. Does not start Ray.

    Exit codes: 0 no problem found, 1 at least one problem, 2 invalid arguments.
    """
    from rich.console import Console

    from moray.jobs.doctor.finding import Verdict
    from moray.jobs.doctor.run import run_checks
    from moray.jobs.doctor.table import CHECKS
    from moray.jobs.views import doctor as doctor_view

    findings = run_checks(CHECKS, read_subject(spec, model, address, set_ or []))
    if as_json:
        print(json.dumps(doctor_view.describe(findings), indent=2))
    else:
        Console().print(doctor_view.render(findings))
    sys.exit(1 if doctor_view.worst(findings) is Verdict.PROBLEM else 0)


def read_subject(spec: Path | None, model: str | None, address: str | None, overrides: list[str]) -> "Subject":
    """Return what is to be checked. Raises UserError for options that do not go together, or a spec that is wrong."""
    from moray.jobs.doctor.finding import Subject

    if spec is None:
        if overrides:
            raise UserError("--set sets a field of a job spec; give the SPEC too")
        return Subject(model=model, address=address)
    if model is not None:
        raise UserError("SPEC names a model already; to check another one: --set model.path=PATH")
    from moray.batch.spec import load_spec

    job = load_spec(spec, overrides)
    return Subject(job, job.model.path, address)
