"""Run the loads of stage_engine.py on the peers' engines, one process after the other: each gets the whole GPU."""

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpu.engine_plan import MIN_S, MIXED, OUTPUT, PROMPT, STEPS
from gpu.loads import Answer, Load
from gpu.measure import ceilings
from gpu.models import CONFIGS, NAMES, folder
from gpu.setup import NO_TIME, Row, Setup
from gpu.stage_engine import as_row, free
from moray.engine.checkpoint.model_config import read_model_config

ROOT = Path(__file__).resolve().parents[2]
DRY = (Load("decode", 2, 12, 3, 150), Load("mixed", 2, 12, 4, 150))


@dataclass(frozen=True)
class Peer:
    """Describes a process of a peer.

    command: without the loads, which are its last argument
    share: share of the stage's remaining time that it may take
    """

    name: str
    model: str
    command: tuple[str, ...]
    loads: tuple[Load, ...]
    share: float
    environment: dict[str, str]

    def without_done(self, setup: Setup) -> "Peer":
        """Return the peer with the loads that no earlier call has run."""
        about = {"engine": self.name, "model": self.model}
        left = tuple(load for load in self.loads if setup.find(**about, **asdict(load)) is None)
        return replace(self, loads=left)


def run(setup: Setup) -> Iterator[Row]:
    found, record = ceilings(setup.device)
    free(setup.device)
    if setup.find(engine="ceilings") is None:
        yield {"engine": "ceilings", **record}
    for peer in (peer.without_done(setup) for peer in peers(setup)):
        if not peer.loads:
            continue
        config = read_model_config(folder(peer.model, is_tiny=setup.is_dry))
        limit_s = setup.seconds_left * peer.share
        if limit_s < MIN_S and not setup.is_dry:
            yield {"engine": peer.name, "model": peer.model, "error": NO_TIME}
            continue
        for message in answers(peer, limit_s):
            if "load" not in message:
                yield {"engine": peer.name, "model": peer.model, **message}
                continue
            load, answer = Load(**message["load"]), Answer(**message["answer"])
            yield as_row(peer.name, peer.model, load, answer, config, found) | message["facts"]


def peers(setup: Setup) -> list[Peer]:
    """Return the peers in the order in which they run, the most important first."""
    phi, _, mixtral, *_ = NAMES
    decode = tuple(Load("decode", n, PROMPT, STEPS) for n in (32, 1, 128, 512, 256, 8))
    mixed = tuple(Load("mixed", n, PROMPT, OUTPUT) for n in MIXED)
    found = []
    if setup.vllm_site is not None:
        found.append(_vllm(setup, phi, (*decode, *mixed), 0.6))
    some = tuple(load for load in decode if load.num_sequences in (1, 32, 128))
    found += [
        _transformers(setup, phi, "static", some[:2], 0.4),
        _transformers(setup, phi, "eager", some, 0.4),
        _transformers(setup, phi, "continuous", mixed[:1], 0.6),
    ]
    if setup.vllm_site is not None:
        found.append(_vllm(setup, mixtral, decode[:1], 1.0))
    if setup.is_dry:
        ways = {"eager": DRY[:1], "continuous": DRY[1:]}
        return [_transformers(setup, phi, way, loads, 1.0) for way, loads in ways.items()]
    return found


def _vllm(setup: Setup, model: str, loads: tuple[Load, ...], share: float) -> Peer:
    command = sys.executable, "-m", "gpu.peer_vllm", str(CONFIGS / model)
    return Peer("vLLM", model, command, loads, share, _environment(setup.vllm_site))


def _transformers(setup: Setup, model: str, way: str, loads: tuple[Load, ...], share: float) -> Peer:
    where = str(folder(model, is_tiny=setup.is_dry))
    command = sys.executable, "-m", "gpu.peer_transformers", where, way, setup.device.type
    return Peer(f"transformers {way}", model, command, loads, share, _environment(None))


def _environment(site: Path | None) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    others = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    return environment | {"PYTHONPATH": os.pathsep.join([*([] if site is None else [str(site)]), *others])}


def answers(peer: Peer, limit_s: float) -> Iterator[dict[str, Any]]:
    """Yield a peer's answers until its process ends or its time is over; last, if it failed, the reason."""
    give_up = time.monotonic() + limit_s
    log = Path(tempfile.mkdtemp(prefix="moray-peer-")) / "log.txt"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*peer.command, json.dumps([asdict(load) for load in peer.loads])],
            cwd=ROOT / "benchmarks",
            env=peer.environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    watched = selectors.DefaultSelector()
    watched.register(process.stdout, selectors.EVENT_READ)
    try:
        while (left := give_up - time.monotonic()) > 0:
            if watched.select(min(left, 1.0)):
                line = process.stdout.readline()
                if not line:
                    break
                yield json.loads(line)
        if left <= 0:
            yield {"error": f"stopped after {limit_s:.0f} s", "stopped": True, "log": _tail(log)}
        elif process.wait(30) != 0:
            yield {"error": f"ended with code {process.returncode}", "stopped": True, "log": _tail(log)}
    finally:
        _end(process)
        print(f"{peer.name} wrote, last:\n{_tail(log)}", flush=True)
        shutil.rmtree(log.parent)


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and those that it started, which hold the GPU's memory too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
