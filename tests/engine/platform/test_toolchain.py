"""Tests that what Triton needs to build its launchers is checked before a model is loaded."""

import logging
from pathlib import Path

import pytest
import torch

from moray.engine.backends.choose import choose_backend
from moray.engine.backends.cuda import device as device_module
from moray.engine.errors import DeviceError
from moray.engine.platform import toolchain
from moray.engine.platform.toolchain import find_toolchain_problems, has_built_launchers


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a machine with neither a compiler nor Python's headers."""
    for name in ("CC", "TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "include")})
    return tmp_path


def put(path: Path, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode)


def test_each_thing_that_is_missing_is_named_with_its_fix(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, headers = find_toolchain_problems()
    assert compiler == "no C compiler (gcc or clang) is on the PATH: apt-get install gcc, or set CC"
    assert headers.startswith(f"Python's headers are not in {bare}/include: apt-get install python3.")
    put(bare / "include/Python.h")
    monkeypatch.setenv("CC", "/nowhere/cc -O2")
    assert find_toolchain_problems() == [
        "CC is '/nowhere/cc -O2', and there is no such program: unset it, or name a C compiler"
    ]
    put(bare / "bin/clang", 0o755)
    monkeypatch.delenv("CC")
    assert find_toolchain_problems() == []


def test_a_cuda_device_without_them_is_refused_unless_some_are_built(
    bare: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device_module, "check_capability", lambda device: None)
    with pytest.raises(DeviceError, match=r"cannot build the launchers of its kernels here: no C compiler .* headers"):
        choose_backend("cuda")
    put(bare / ".triton/cache/ABC/cuda_utils.so")
    assert has_built_launchers()
    with caplog.at_level(logging.WARNING):
        assert choose_backend("cuda").name == "cuda"
    assert "no C compiler (gcc or clang) is on the PATH: apt-get install gcc" in caplog.text
    assert "a step that needs another will fail" in caplog.text
    put(bare / "include/Python.h")
    put(bare / "bin/gcc", 0o755)
    caplog.clear()
    assert choose_backend("cuda").name == "cuda" and not caplog.text
