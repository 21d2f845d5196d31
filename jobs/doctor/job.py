"""Check what one job needs: its input, its output folder, credentials for stores, and that all fit together."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moray.batch.units import count, size
from moray.engine.errors import CheckpointError, InputError, NodeError, UserError
from moray.jobs.doctor.finding import Finding, Subject, ok, problem, warning
from moray.jobs.doctor.places import access_fix, file_system, free_bytes, nearest_folder, probe

if TYPE_CHECKING:
    from moray.batch.output.folder import OutputFolder

TOKEN_BYTES = 5  # about the size of one generated token as text, before compression; its id takes 4 more
ROW_BYTES = 64  # about the size of the columns that moray adds to each row, without the text
JOB_BYTES = 4 * 10**6  # about the size of the job's own folder: plan, events, report
MIN_FREE_BYTES = 2**24  # free space below which any job counts as one that will fail
PROBE = "_job/doctor-probe"
# file system -> the risk of an output folder there
RISKS = {
    "tmpfs": "it is memory: files there are lost when the machine stops",
    "overlay": "files there are lost with the container",
    "fuse": "a store that is mounted as a disk may rename files in two steps",
}
# scheme -> environment variables, then files, in which its tools look for credentials
CREDENTIALS = {
    "s3": (("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"), ("~/.aws/credentials", "~/.aws/config")),
    "gs": (("GOOGLE_APPLICATION_CREDENTIALS",), ("~/.config/gcloud/application_default_credentials.json",)),
    "hf": (("HF_TOKEN", "HF_TOKEN_PATH"), ("~/.cache/huggingface/token",)),
}  # fmt: skip
GOOGLE_FILE = "GOOGLE_APPLICATION_CREDENTIALS"


def source(subject: Subject) -> Iterator[Finding]:
    """Read the footers of the input."""
    if subject.spec is None:
        return
    from moray.batch.input import read_input

    try:
        files = read_input(subject.spec)
    except UserError as error:
        yield problem(" ".join(str(error).split()), "correct input.path or the columns that are named in input")
        return
    num_bytes = sum(file.size for file in files.files)
    yield ok(f"{count(files.num_rows, 'row')} in {count(len(files.files), 'file')}, {size(num_bytes)}")


def plan(subject: Subject) -> Iterator[Finding]:
    """Check that spec, input, model and output folder fit together; other checks report mistakes in one alone."""
    if subject.spec is None:
        return
    from moray.batch.output.folder import OutputFolder
    from moray.batch.output.job_folder import check_folder
    from moray.batch.plan.planner import plan_job

    try:
        job = plan_job(subject.spec)
        check_folder(OutputFolder(subject.spec.output.path), job.plan)
    except (InputError, CheckpointError, NodeError):
        return
    except UserError as error:
        yield problem(" ".join(str(error).split()), "correct the spec; moray plan shows every mistake")
        return
    yield ok(f"{count(len(job.plan.shards), 'shard')}; spec, input, model and output folder fit together")


def output(subject: Subject) -> Iterator[Finding]:
    """Publish a small file where the job will write, and compare the free space there with what the job may write."""
    if subject.spec is None:
        return
    from moray.batch.output.folder import OutputFolder

    path = subject.spec.output.path
    try:
        folder = OutputFolder(path)
    except UserError as error:
        yield problem(" ".join(str(error).split()), "correct output.path")
        return
    yield _local_output(subject, folder.root, path) if folder.is_local else _stored_output(folder)


def _local_output(subject: Subject, root: str, path: str) -> Finding:
    if any(part.is_file() for part in (Path(root), *Path(root).parents)):
        return problem(f"{path} is a file, or is below one", "name a folder in output.path")
    folder = nearest_folder(root)
    kind = file_system(folder)
    value = path if folder == Path(root) else f"{path} (to be made in {folder})"
    try:
        probe(folder)
    except OSError as error:
        fix = "write to another folder, or make this one writable"
        return problem(f"{value}: a file cannot be published there: {error.strerror or error}", fix)
    free, total = free_bytes(folder)
    needed = _max_output_bytes(subject)
    value += f": {size(free)} of {size(total)} free" + (f" ({kind})" if kind else "")
    if needed is not None:
        value += f", the job writes about {size(needed)} at most"
    if free < MIN_FREE_BYTES:
        return problem(value, "make room, or write to another disk")
    if needed is not None and free < needed:
        return warning(value, "make room, or write to another disk; a job that finds the disk full can be continued")
    if (risk := RISKS.get(kind.partition(".")[0])) is not None:
        return warning(f"{value}; {risk}", "write to a persistent disk, or give a store's address, s3:// or gs://")
    return ok(value)


def _stored_output(folder: "OutputFolder") -> Finding:
    start_s = time.monotonic()
    try:
        folder.write(PROBE, b"probe")
        folder.remove(PROBE)
    except OSError as error:
        return problem(folder.explain(error, PROBE), access_fix(folder.path, "write"))
    return ok(f"{folder.path}: a file was written and removed in {time.monotonic() - start_s:.1f} s")


def _max_output_bytes(subject: Subject) -> int | None:
    """Estimate the size of the output if every row generates all it may; None where the input cannot be read."""
    from moray.batch.input import read_input
    from moray.batch.plan.planner import tokens_per_row

    spec = subject.spec
    assert spec is not None
    try:
        files = read_input(spec)
    except UserError:
        return None
    kept = sum(file.size for file in files.files) if files.kept_columns else 0
    logprobs = 12 * (1 + (spec.output.logprobs or 0)) if spec.output.logprobs is not None else 0
    token_bytes = TOKEN_BYTES + 4 * spec.output.token_ids + logprobs
    return JOB_BYTES + kept * spec.sampling.n + files.num_rows * (tokens_per_row(spec) * token_bytes + ROW_BYTES)


def credentials(subject: Subject) -> Iterator[Finding]:
    """Report where the credentials for each store of the job come from. Other checks show whether they are enough."""
    for scheme in sorted({path.partition("://")[0] for path in _paths(subject)} & CREDENTIALS.keys()):
        variables, files = CREDENTIALS[scheme]
        found = [name for name in variables if os.environ.get(name)]
        found += [file for file in files if Path(file).expanduser().is_file()]
        missing = os.environ.get(GOOGLE_FILE, "")
        if scheme == "gs" and missing and not Path(missing).is_file():
            yield problem(f"{scheme}://: {GOOGLE_FILE} is {missing}, which does not exist", "name a file that exists")
        else:
            role = "none here; public data, or what the machine's role allows"
            yield ok(f"{scheme}://: {', '.join(found) or role}")


def _paths(subject: Subject) -> list[str]:
    paths = [subject.model] if subject.model else []
    if subject.spec is not None:
        inputs = subject.spec.input.path
        paths += [subject.spec.output.path, *([inputs] if isinstance(inputs, str) else inputs)]
    return [path for path in paths if "://" in path]
