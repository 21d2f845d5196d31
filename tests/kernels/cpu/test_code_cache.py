"""Tests of the folder in which machine code is kept: what it depends on, who shares it, and what happens without it."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from patience import PATIENCE_S
from small_disk import small_disk

from moray.kernels.cpu import code_cache
from moray.kernels.cpu.code_cache import NAME, SOURCES
from moray.kernels.cpu.isa import isas
from moray.kernels.cpu.numba_intrinsics import CFunction, compiled

DAY_S = 24 * 3600
KINDS = ("int8", "int4", "fp8", "fp4")


def made_function() -> Callable[..., Any]:
    """Return a function that was never compiled."""

    def double(x: Any) -> None:
        for i in range(len(x)):
            x[i] += x[i]

    return double


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path | None]:
    """Returns what code_folder would return in a process with these settings."""

    def ask(chosen: Path | None = None, caches: Path | None = None, temporary: Path | None = None) -> Path | None:
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(chosen or ""))
        monkeypatch.setenv("XDG_CACHE_HOME", str(caches or "/proc"))
        monkeypatch.setattr(code_cache.tempfile, "tempdir", str(temporary or "/proc"))
        return code_cache.code_folder.__wrapped__()

    return ask


def test_the_name_is_a_hash_of_sources_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
    names = [code_cache._hash(SOURCES)]
    assert code_cache._hash(sources) == names[0]
    (sources / "tiles.py").rename(sources / "tiles_.py")
    names.append(code_cache._hash(sources))
    (sources / "tiles_.py").write_text("")
    names.append(code_cache._hash(sources))
    for name, value in (("OPT", 3), ("LOOP_VECTORIZE", 0)):
        assert getattr(numba.config, name) != value
        monkeypatch.setattr(numba.config, name, value)
        names.append(code_cache._hash(sources))
    monkeypatch.setattr(numba, "__version__", "0.1")
    names.append(code_cache._hash(sources))
    assert len(set(names)) == 6


def test_where_it_is(tmp_path: Path, choose: Callable[..., Path | None]) -> None:
    chosen, caches, temporary = tmp_path / "chosen", tmp_path / "caches", tmp_path / "temporary"
    temporary.mkdir()
    name = f"moray-{code_cache._hash(SOURCES)}"
    assert choose(chosen, caches, temporary) == chosen / name
    assert choose(None, caches, temporary) == caches / "moray/numba" / name
    assert choose(None, None, temporary) == temporary / f"moray-numba-{os.getuid()}" / name
    assert choose() is None
    shutil.rmtree(chosen)
    chosen.touch()  # no folder can be made there
    assert choose(chosen, caches, temporary) == caches / "moray/numba" / name


def test_a_temporary_folder_that_others_may_write_is_left_alone(
    tmp_path: Path, choose: Callable[..., Path | None]
) -> None:
    folder = tmp_path / f"moray-numba-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert choose(temporary=tmp_path) is None
    folder.chmod(0o755)
    assert choose(temporary=tmp_path) is not None
    folder.rename(tmp_path / "other")
    folder.symlink_to(tmp_path / "other")
    assert choose(temporary=tmp_path) is None


def test_a_new_folder_ends_those_that_nobody_used(tmp_path: Path, choose: Callable[..., Path | None]) -> None:
    def make(name: str, days: int) -> Path:
        folder = tmp_path / name
        (folder / "cpu").mkdir(parents=True)
        used_s = time.time() - days * DAY_S
        os.utime(folder, (used_s, used_s))
        return folder

    old, young, other = make("moray-0123456789abcdef", 31), make("moray-00112233aabbccdd", 29), make("cpu_0123", 99)
    used = choose(tmp_path)
    assert used is not None and NAME.fullmatch(used.name)
    assert set(tmp_path.iterdir()) == {used, young, other}
    os.utime(used, (0, 0))
    old.mkdir()
    os.utime(old, (0, 0))
    assert choose(tmp_path) == used and old.exists()  # only a new folder costs the time to look for others
    assert used.stat().st_mtime > time.time() - DAY_S


def test_the_environment_is_left_as_it_is() -> None:
    before = dict(os.environ), numba.config.CACHE_DIR, numba.config.CACHE_LOCATOR_CLASSES
    kept = compiled(made_function())
    folder = code_cache.code_folder()
    assert folder is not None and Path(kept.stats.cache_path).parent == folder
    assert (dict(os.environ), numba.config.CACHE_DIR, numba.config.CACHE_LOCATOR_CLASSES) == before


def test_functions_run_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_cache, "code_folder", lambda: None)
    double = compiled(made_function())
    x = np.arange(3)
    double(x)
    assert x.tolist() == [0, 2, 4] and double.stats.cache_path is None


def test_a_full_disk_does_not_stop_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", 2**16) as disk:
        monkeypatch.setattr(code_cache, "code_folder", lambda: disk.path / "folder")
        double, function = compiled(made_function()), CFunction(lambda x: None)
        with pytest.raises(OSError, match="No space left"):
            (disk.path / "filler").write_bytes(bytes(2**17))
        x = np.arange(3)
        double(x)
        assert x.tolist() == [0, 2, 4] and function.address
        assert not [path for path in disk.path.rglob("*.nbc") if path.stat().st_size]


def is_waiting_for(path: Path) -> bool:
    """Return whether a thread waits for the lock of a file."""
    inode = path.stat().st_ino
    return any(
        words[1] == "->" and words[6].endswith(f":{inode}")
        for words in map(str.split, Path("/proc/locks").read_text().splitlines())
    )


def test_one_process_at_a_time_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_cache, "code_folder", lambda: tmp_path)
    double, x = compiled(made_function()), np.arange(3)
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        saving = threading.Thread(target=double, args=(x,))
        saving.start()
        while not is_waiting_for(tmp_path / ".lock"):
            assert saving.is_alive(), "it has not waited"
            time.sleep(0.01)
        assert not list(tmp_path.rglob("*.nb[ic]"))
    saving.join(PATIENCE_S)
    assert len(list(tmp_path.rglob("*.nb[ic]"))) == 2


ADDED_KERNEL = """
from moray.kernels.cpu.added_callee import number
from moray.kernels.cpu.isa import isas
from moray.kernels.cpu.numba_intrinsics import compiled

@compiled
def fill(x):
    x[:] = number()
"""

ADDED_CALLEE = """
import numba

@numba.njit
def number():
    return {number}
"""

RUN_ADDED = """
import numpy as np
from moray.kernels.cpu.added_kernel import fill

x = np.zeros(1)
fill(x)
print(x[0], sum(fill.stats.cache_hits.values()))
"""


@pytest.mark.slow  # test_the_name_is_a_hash_of_sources_and_options is the fast one
def test_a_changed_callee_is_compiled_again_and_moved_sources_are_not(tmp_path: Path) -> None:
    """The first two processes begin at once and without a cache."""
    copy = tmp_path / "moray/kernels"
    shutil.copytree(SOURCES.parent, copy, ignore=shutil.ignore_patterns("__pycache__", "gpu"))
    (copy.parent / "__init__.py").touch()
    (copy / "cpu/added_kernel.py").write_text(ADDED_KERNEL)
    environment = {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def ask(number: float, processes: int) -> list[list[str]]:
        (copy / "cpu/added_callee.py").write_text(ADDED_CALLEE.format(number=number))
        return [output(one).split() for one in [start(RUN_ADDED, **environment) for _ in range(processes)]]

    assert {value for value, _ in ask(1.0, 2)} == {"1.0"}
    assert ask(2.0, 1) == [["2.0", "0"]]
    (tmp_path / "elsewhere").mkdir()
    copy.parent.rename(tmp_path / "elsewhere/moray")
    moved = start(RUN_ADDED, **environment | {"PYTHONPATH": str(tmp_path / "elsewhere")})
    assert output(moved).split() == ["2.0", "1"], "the same sources in another folder have the same code"


RUN_QUANTIZED = """
import gc, json, sys
import torch
from numba.core.ccallback import CFunc
from numba.core.dispatcher import Dispatcher
from moray.kernels.activation import SWIGLU
from moray.kernels.cpu.experts import PackedExpert, PackedExperts, experts
from moray.kernels.cpu.quantized import pack_quantized, quantized_linear

def quantized(kind, outputs, inputs):
    numbers = torch.randn(outputs, inputs, generator=g)
    codes = numbers.to(torch.float8_e4m3fn) if kind == "fp8" else (numbers * 2).round().clamp(-8, 7).to(torch.int8)
    codes = (codes + 8).to(torch.uint8) if kind == "fp4" else codes
    scales = torch.rand(outputs, inputs // 64, generator=g)
    return pack_quantized(codes, torch.exp2(scales.log2().round()) if kind == "fp4" else scales, 64, None, kind)

bits = {}
for kind in sys.argv[1:]:
    g = torch.Generator().manual_seed(sum(kind.encode()))
    layer = [PackedExpert(quantized(kind, 128, 192), quantized(kind, 128, 192), quantized(kind, 192, 128), SWIGLU)
             for _ in range(4)]
    together = PackedExperts(layer)
    assert together.table(torch.bfloat16) is not None
    for n in (1, 2, 7):
        x = torch.randn(n, 192, generator=g).bfloat16()
        routed = torch.rand(n, 2, generator=g), torch.rand(n, 4, generator=g).argsort(dim=1)[:, :2]
        results = experts(x, *routed, together), experts(x, *routed, layer), quantized_linear(x, layer[0].up)
        bits[f"{kind}, {n} rows"] = [result.view(torch.int16).tolist() for result in results]

loaded, made = set(), set()
for it in gc.get_objects():
    if isinstance(it, Dispatcher) and it.stats.cache_path:
        loaded |= {it.__name__} if it.stats.cache_hits else set()
        made |= {it.__name__} if it.stats.cache_misses else set()
    elif isinstance(it, CFunc):
        (loaded if it.cache_hits else made).add(it.__name__)
print(json.dumps([bits, sorted(loaded), sorted(made)]))
"""


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in isas(), reason="no quantized kernels of our own on this CPU")
def test_loaded_code_computes_what_compiled_code_does(tmp_path: Path) -> None:
    """Two processes at a time fill a cache, with kernels of other kinds; two more load those of both, one of them with
    the same sources in another folder."""
    filling = [start(RUN_QUANTIZED, *kinds, NUMBA_CACHE_DIR=str(tmp_path)) for kinds in (KINDS[:1], KINDS[1:])]
    computed: dict[str, Any] = {}
    used: set[str] = set()
    for process, kinds in zip(filling, (KINDS[:1], KINDS[1:]), strict=True):
        bits, loaded, made = json.loads(output(process))
        computed |= bits
        used |= {*loaded, *made}
        for kind in kinds:
            assert any(name.startswith(f"_{kind}_") for name in made), made
            assert any(name.startswith(f"_run_{kind}_") for name in made), made
    assert {"_run_experts", "_experts_piece"} < used
    shutil.copytree(SOURCES.parent, tmp_path / "moray/kernels", ignore=shutil.ignore_patterns("__pycache__", "gpu"))
    (tmp_path / "moray/__init__.py").touch()
    for path in ({}, {"PYTHONPATH": str(tmp_path)}):
        process = start(RUN_QUANTIZED, *KINDS, NUMBA_CACHE_DIR=str(tmp_path), **path)
        assert json.loads(output(process)) == [computed, sorted(used), []]
    assert all(together == one_by_one for together, one_by_one, _ in computed.values())
    assert len({str(results) for results in computed.values()}) == 3 * len(KINDS)


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def output(process: subprocess.Popen[str]) -> str:
    printed, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    return printed
