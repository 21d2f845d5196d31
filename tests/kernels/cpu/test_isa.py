import subprocess
import sys

import pytest
import torch
from patience import PATIENCE_S

from moray.kernels.cpu import isa
from moray.kernels.cpu.isa import NEEDED, VARIABLE, isas
from moray.kernels.cpu.linear import linear, linear_ref, pack, paths

OLDEST_FIRST = tuple(NEEDED)


@pytest.fixture(autouse=True)
def ask_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "_isas", isa._isas.__wrapped__)
    monkeypatch.delenv(VARIABLE, raising=False)


def with_features(monkeypatch: pytest.MonkeyPatch, *names: str, tiles: bool = True) -> None:
    features = frozenset().union(*(NEEDED[name] for name in names))
    monkeypatch.setattr(isa, "_features", lambda: features)
    monkeypatch.setattr(isa, "_may_use_tiles", lambda: tiles)


def test_the_best_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with_features(monkeypatch, *OLDEST_FIRST)
    assert isas() == ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2")
    with_features(monkeypatch, "avx2", "avx512")
    assert isas() == ("avx512", "avx2")
    with_features(monkeypatch)
    assert isas() == ()


def test_a_kernel_that_refuses_tiles_leaves_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    with_features(monkeypatch, *OLDEST_FIRST, tiles=False)
    assert isas() == ("avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2")


def test_the_variable_lowers_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with_features(monkeypatch, *OLDEST_FIRST)
    monkeypatch.setenv(VARIABLE, "avx512")
    assert isas() == ("avx512", "avx_vnni", "avx2")
    assert paths(torch.bfloat16)[:2] == ("avx512", "avx2")


@pytest.mark.parametrize("value", ["amx", "sse", "AVX2 "])
def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    with_features(monkeypatch, "avx2", "avx512")
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=f"MORAY_CPU_ISA is '{value}'; on this machine it can be avx2, avx512"):
        isas()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_path_of_this_machine_is_right(dtype: torch.dtype) -> None:
    weight, x = torch.randn(70, 100).to(dtype), torch.randn(9, 100).to(dtype)
    assert paths(dtype)[-1] == "plain"
    for path in paths(dtype):
        got, want = linear(x, pack(weight, path=path), "silu").float(), linear_ref(x, weight, None, "silu").float()
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2, msg=path)


def test_an_engine_says_what_the_variable_can_be() -> None:
    code = "from moray.engine.backends.choose import choose_backend; choose_backend('cpu')"
    env = {"MORAY_CPU_ISA": "mmx", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, timeout=PATIENCE_S)
    assert "UserError: MORAY_CPU_ISA is 'mmx'; on this machine it can be" in done.stderr
