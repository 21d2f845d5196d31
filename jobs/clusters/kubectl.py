"""Run the user's own kubectl, in its current context: moray uses nothing else to talk to Kubernetes."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moray.engine.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CLOUDS = ROOT / "k8s/overlays"


def render_overlay(overlay: str) -> list[dict[str, Any]]:
    """Render the overlay of a job with kustomize and return its objects.

    overlay: the name of one of k8s/overlays, or a folder

    Raises UserError where there is no such overlay, or where it cannot be rendered.
    """
    known = sorted(path.parents[1].name for path in CLOUDS.glob("*/batch/kustomization.yaml"))
    folder = CLOUDS / overlay / "batch" if overlay in known else Path(overlay)
    if not (folder / "kustomization.yaml").is_file():
        names = ", ".join(known) or f"none; {CLOUDS} does not exist"
        raise UserError(f"--overlay must be a folder with a kustomization.yaml, or one of {names}; is {overlay!r}")
    return list(yaml.safe_load_all(kubectl(["kustomize", str(folder)])))


def kubectl_json(arguments: Sequence[str]) -> Any:
    """Run kubectl and return the JSON that it prints. Raises UserError with its message where it fails."""
    return json.loads(kubectl([*arguments, "--output=json"]))


def kubectl(arguments: Sequence[str], text: str | None = None) -> str:
    """Run kubectl with `text` as its input and return its output. Raises UserError with its message where it fails."""
    done = _run(arguments, input=text, capture_output=True)
    if done.returncode != 0:
        raise UserError(f"kubectl {arguments[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def kubectl_shown(arguments: Sequence[str]) -> int:
    """Run kubectl with its output on the terminal, and return its exit code."""
    return _run(arguments).returncode


def _run(arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["kubectl", *arguments], text=True, check=False, **options)
    except FileNotFoundError:
        raise UserError(
            "there is no kubectl on the PATH; --kuberay renders and applies with it: https://kubernetes.io/docs/tasks/tools"
        ) from None
