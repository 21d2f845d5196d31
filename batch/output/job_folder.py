"""Whose an output folder is: the job's whose plan lies in it. Another job is refused, with the differences."""

import json
import re
import socket
from collections.abc import Iterator

from batch.faults.patience import patiently
from batch.output.folder import JOB, OutputFolder
from batch.planning.plan import Plan
from batch.spec import JobSpec
from engine.errors import JobError, OutputError

PLAN = f"{JOB}/plan.json"
_PART = re.compile(r"part-([0-9a-f]{8})-\d+\.parquet")
_SHOWN = 20


def read_plan(folder: OutputFolder) -> Plan:
    """The plan of the job that wrote the folder. Raises OutputError where there is none."""
    text = folder.read(PLAN)
    if text is None:
        raise OutputError(f"{folder.path} is not the output folder of a job: it has no {PLAN}.")
    try:
        return Plan.from_json(text.decode())
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{folder.path}/{PLAN} cannot be read; without it nobody knows what the job was.") from None


def check_folder(folder: OutputFolder, plan: Plan) -> None:
    """Raises OutputError where the folder holds what another job wrote, or Parquet files of others.

    A job that wrote no part, because it failed before its first, has no claim to the folder.
    """
    text = folder.read(PLAN)
    has_parts = any(name.endswith(".parquet") for name in folder.names())
    if has_parts and text is not None and (differences := list(_differences(text.decode(), plan))):
        more = [f"... and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
        message = "holds the output of another job. Give this one a folder of its own, or undo what changed:"
        raise OutputError("\n  ".join([f"{folder.path} {message}", *differences[:_SHOWN], *more]))
    for name in folder.names():
        match = _PART.fullmatch(name)
        if name.endswith(".parquet") and (match is None or match[1] != plan.fingerprint.short):
            raise OutputError(f"{folder.path} holds {name}, which this job did not write; give it a folder of its own.")


def claim_folder(folder: OutputFolder, spec: JobSpec, plan: Plan) -> None:
    """Write down whose folder it is, where that is not done yet. check_folder comes first.

    Raises OutputError where it cannot be written.
    """
    folder.remove_abandoned()
    text = folder.read(PLAN)
    if text is None or any(_differences(text.decode(), plan)):
        try:
            folder.write(f"{JOB}/spec.yaml", spec.to_yaml().encode())
            folder.write(PLAN, plan.to_json().encode())
        except OSError as error:
            raise OutputError(folder.explain(error)) from None


def check_seen(folder: OutputFolder, fingerprint: str) -> None:
    """Raises OutputError where this machine does not see the folder that the driver has claimed, JobError where it
    cannot be read: when a stage is started in the middle of a run, its store may be away for a moment."""
    try:
        text = patiently(lambda: folder.read(PLAN), OutputError)
    except OutputError as error:
        raise JobError(str(error)) from None
    if text is None or json.loads(text)["fingerprint"] != fingerprint:
        here = socket.gethostname()
        raise OutputError(
            f"{folder.path} on {here} is not the folder that the driver sees; give an address such as s3://bucket, or "
            "a path on a disk that every node of the cluster shares."
        )


def _differences(text: str, plan: Plan) -> Iterator[str]:
    try:
        there = Plan.from_json(text)
    except (ValueError, KeyError, TypeError):
        yield f"{PLAN} cannot be read; remove the folder's _job to take the parts as they are"
        return
    yield from there.fingerprint.differences(plan.fingerprint)
    if there.fingerprint == plan.fingerprint and there.shards != plan.shards:
        yield f"the shards: {len(there.shards)} of another version of moray -> {len(plan.shards)}"
