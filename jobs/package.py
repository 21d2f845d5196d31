"""What is sent to a cluster: the spec, and moray itself where the cluster's image does not have it."""

import shutil
from importlib.metadata import version
from pathlib import Path

from batch.spec import JobSpec
from engine.errors import Problem, SpecError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "engine", "batch", "serve", "jobs")
SPEC, START = "job.yaml", "moray_start.py"
ENTRYPOINT = f"python {START} run {SPEC} --address auto"


def check_paths(spec: JobSpec) -> None:
    """Raises SpecError for paths that mean nothing on another machine.

    Nothing of the data is sent along: Ray copies what is sent to every node, 500 MiB at most, and what a job writes
    beside it is gone with the node.
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
    """Put together in an empty folder what Ray is to unpack, on every node, as the job's working directory."""
    (folder / SPEC).write_text(spec.to_yaml(), encoding="utf-8")
    shutil.copy(ROOT / "jobs/start.py", folder / START)
    if not with_code:
        return
    for name in PACKAGES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    # moray asks for its version, which is the distribution's.
    about = folder / f"moray-{version('moray')}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: moray\nVersion: {version('moray')}\n")
