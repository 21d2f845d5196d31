"""Assemble what is uploaded to a cluster: the spec, and moray itself where the cluster's image does not have it."""

import shutil
from importlib.metadata import version
from pathlib import Path

import moray
from moray.batch.spec import JobSpec
from moray.engine.errors import Problem, SpecError

PACKAGE = Path(moray.__file__).parent
SPEC, START = "job.yaml", "moray_start.py"
ENTRYPOINT = f"python {START} run {SPEC} --address auto"


def check_paths(spec: JobSpec) -> None:
    """Raise SpecError for paths that mean nothing on another machine.

    No data are uploaded with a job: Ray copies the upload to every node, 500 MiB at most, and files that a job writes
    next to it are lost with the node.
    """
    inputs = (spec.input.path,) if isinstance(spec.input.path, str) else spec.input.path
    named = [("model.path", spec.model.path), *(("input.path", path) for path in inputs)]
    problems = [
        Problem(key, f"{path!r} is relative to a folder of this machine; give an absolute path on a disk that every "
                     "node of the cluster sees, or an address such as s3://bucket/folder")
        for key, path in [*named, ("output.path", spec.output.path)]
        if "://" not in path and not path.startswith("/")
    ]  # fmt: skip
    if problems:
        raise SpecError(problems)


def stage(spec: JobSpec, folder: Path, *, with_code: bool) -> None:
    """Write into an empty folder what Ray unpacks on every node as the job's working directory.

    with_code: include moray itself
    """
    (folder / SPEC).write_text(spec.to_yaml(), encoding="utf-8")
    shutil.copy(PACKAGE / "jobs/cluster_entrypoint.py", folder / START)
    if not with_code:
        return
    shutil.copytree(PACKAGE, folder / "moray", ignore=shutil.ignore_patterns("__pycache__"))
    # Without metadata of a distribution moray could not find its own version.
    dist_info = folder / f"moray-{version('moray')}.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: moray\nVersion: {version('moray')}\n")
