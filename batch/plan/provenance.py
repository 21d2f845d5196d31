"""Describe how a part was made, for the metadata of each part."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from moray.batch.plan.planner import PlannedJob
from moray.engine.checkpoint.model_source import ModelSource


def describe_origin(job: PlannedJob, run: str) -> dict[str, Any]:
    """Return the versions, the run, the model, the format of its weights if they are quantized, and the spec.

    llguidance decides which tokens a grammar allows, so its version is there beside moray's.
    """
    return {
        "moray": version("moray"),
        "llguidance": version("llguidance"),
        "run": run,
        "model": pinned_path(job.model),
        "quantization": job.model_info.quantization,
        "spec": job.spec.model_dump(mode="json"),
    }


def pinned_path(model: ModelSource) -> str:
    """Return the model's path with the revision it has now, or its absolute path where it is a local folder."""
    if "://" not in model.path:
        return str(Path(model.path).expanduser().resolve())
    return model.path if model.revision is None else f"{model.path.split('@')[0]}@{model.revision}"
