"""Record where and when a number was measured, and write it to a file. Every benchmark uses this module."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def context(*distributions: str) -> dict[str, Any]:
    """Return date, commit, command, machine and the versions of the named distributions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join(["python", *sys.argv]),
        "machine": {
            "cpu": _first("/proc/cpuinfo", "model name") or platform.processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            "system": platform.platform(),
        },
        "versions": {name: importlib.metadata.version(name) for name in distributions},
    }


def save(name: str, device: str, result: dict[str, Any]) -> Path:
    """Write `result` to results/<date>-<device>-<name>.json; a later run of the same day replaces it."""
    path = RESULTS / f"{datetime.date.today().isoformat()}-{device}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def commit(checkout: Path = ROOT) -> str:
    """Return the short hash of a checkout's commit; empty outside git."""
    return _git("rev-parse", "--short=12", "HEAD", folder=checkout)


def _git(*arguments: str, folder: Path = ROOT) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _first(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
