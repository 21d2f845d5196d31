"""Ties an output folder to one job, that of the plan in it. Another job is refused, with the differences."""

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

from moray.batch.output.folder import JOB, OutputFolder
from moray.batch.retry import retry_with_backoff
from moray.batch.shards import Plan
from moray.batch.spec import JobSpec
from moray.engine.errors import NodeError, OutputError

PLAN = f"{JOB}/plan.json"
_PART = re.compile(r"part-([0-9a-f]{8})-\d+\.parquet")
_SHOWN = 20  # differences that a message lists, at most


def read_plan(folder: OutputFolder) -> Plan:
    """Return the plan of the job that wrote the folder. Raises OutputError where there is none."""
    text = folder.read(PLAN)
    if text is None:
        raise OutputError(f"{folder.path} is not the output folder of a job: it has no {PLAN}.")
    try:
        return Plan.from_json(text.decode())
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{folder.path}/{PLAN} cannot be read; without it nobody knows what the job was.") from None


def read_component(folder: OutputFolder, name: str) -> Any:
    """Return a component of the fingerprint of the job that wrote the folder; None where there is none."""
    text = folder.read(PLAN)
    try:
        return None if text is None else Plan.from_json(text.decode()).fingerprint.others.get(name)
    except (ValueError, KeyError, TypeError):  # check_folder reports it
        return None


def check_folder(folder: OutputFolder, plan: Plan) -> None:
    """Raise OutputError where the folder holds parts of another job, or other Parquet files.

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
    """Write the job's spec and plan into the folder, where that is not done yet. check_folder comes first.

    Raises OutputError where they cannot be written.
    """
    folder.remove_abandoned()
    text = folder.read(PLAN)
    if text is None or any(_differences(text.decode(), plan)):
        try:
            folder.write(f"{JOB}/spec.yaml", spec.to_yaml().encode())
            folder.write(PLAN, plan.to_json().encode())
        except OSError as error:
            raise OutputError(folder.explain(error)) from None


def check_visible(folder: OutputFolder, fingerprint: str) -> None:
    """Raise OutputError where this machine does not see the folder that the driver has claimed.

    Raises NodeError where the folder cannot be read: when a stage is started in the middle of a run, the store may be
    away for a moment.
    """
    try:
        text = retry_with_backoff(lambda: folder.read(PLAN), OutputError)
    except OutputError as error:
        raise NodeError(str(error)) from None
    if text is None or json.loads(text)["fingerprint"] != fingerprint:
        host = socket.gethostname()
        raise OutputError(
            f"{folder.path} on {host} is not the folder that the driver sees; give an address such as s3://bucket, or "
            "a path on a disk that every node of the cluster shares."
        )


def _differences(text: str, plan: Plan) -> Iterator[str]:
    try:
        recorded = Plan.from_json(text)
    except (ValueError, KeyError, TypeError):
        yield f"{PLAN} cannot be read; remove the folder's _job to use the parts as they are"
        return
    yield from recorded.fingerprint.differences(plan.fingerprint)
    if recorded.fingerprint == plan.fingerprint and recorded.shards != plan.shards:
        yield f"the shards: {len(recorded.shards)} of another version of moray -> {len(plan.shards)}"
