"""The user's own kubectl, with the context that it has: the only way in which moray talks to Kubernetes."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CLOUDS = ROOT / "k8s/overlays"


def render_overlay(overlay: str) -> list[dict[str, Any]]:
    """What kustomize makes of the overlay of a job: one of k8s/overlays by its name, or a folder.

    Raises UserError where there is none, or where it cannot be rendered.
    """
    known = sorted(path.parents[1].name for path in CLOUDS.glob("*/batch/kustomization.yaml"))
    folder = CLOUDS / overlay / "batch" if overlay in known else Path(overlay)
    if not (folder / "kustomization.yaml").is_file():
        names = ", ".join(known) or f"none; {CLOUDS} is not there"
        raise UserError(f"--overlay must be a folder with a kustomization.yaml, or one of {names}; is {overlay!r}")
    return list(yaml.safe_load_all(kubectl(["kustomize", str(folder)])))


def kubectl_json(arguments: Sequence[str]) -> Any:
    return json.loads(kubectl([*arguments, "--output=json"]))


def kubectl(arguments: Sequence[str], text: str | None = None) -> str:
    """Run it to its end and return what it printed; `text` is its input. Raises UserError with what it says of a
    failure."""
    done = _run(arguments, input=text, capture_output=True)
    if done.returncode != 0:
        raise UserError(f"kubectl {arguments[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def kubectl_shown(arguments: Sequence[str]) -> int:
    """Run it with its output on the terminal; returns its exit code."""
    return _run(arguments).returncode


def _run(arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["kubectl", *arguments], text=True, check=False, **options)
    except FileNotFoundError:
        raise UserError(
            "there is no kubectl on the PATH; --kuberay renders and applies with it: https://kubernetes.io/docs/tasks/tools"
        ) from None
