"""Tests of the check of linear layers' paths, with broken paths put before the real ones."""

import ast
import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moray.kernels.cpu import isa, kept_checks, linear_mistakes, onednn, panels, quantized, self_check
from moray.kernels.cpu import thread_pool as cores
from moray.kernels.cpu.kept_checks import LinearCheck
from moray.kernels.cpu.linear import __name__ as linear_module
from moray.kernels.cpu.linear import linear, linear_ref, paths
from moray.kernels.cpu.linear_mistakes import Quantization
from moray.kernels.cpu.self_check import (
    Layer,
    check,
    checked_pack,
    checked_pack_quantized,
    keep_results_in,
    results,
    summary,
)

PLANTED = "planted"
real_isas = isa.isas


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test like a new process, without results."""
    monkeypatch.setattr(self_check, "_results", {})
    monkeypatch.setattr(self_check, "_folder", None)


def plant(monkeypatch: pytest.MonkeyPatch, run: Callable[..., None]) -> None:
    """Make a kernel the best path for bf16."""
    monkeypatch.setattr(f"{linear_module}.isas", lambda: (PLANTED, *real_isas()))
    monkeypatch.setitem(panels.KERNELS, (PLANTED, torch.bfloat16), panels.Kernel(run, torch.float32))


def product(w: Any, x: Any) -> torch.Tensor:
    """Return what a correct kernel computes from its arguments, for all panels at once."""
    weight = torch.from_numpy(w).view(torch.bfloat16).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    return torch.from_numpy(x).double() @ weight.double().T


def write(y: Any, values: torch.Tensor, start: int, stop: int) -> None:
    of_share = slice(start * panels.PANEL, stop * panels.PANEL)
    y[:, of_share] = values.to(torch.bfloat16).view(torch.uint16).numpy()[:, : y.shape[1]][:, of_share]


def right(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    write(y, product(w, x), start, stop)


def by_number(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    """Compute sums that end differently from 33 rows on, as oneDNN's kernels for AMX and AVX-512 do."""
    write(y, product(w, x) * (1 if len(x) < 33 else 1 + 2**-8), start, stop)


def by_place(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    """Compute sums that end differently for rows in the upper half of a block of 16."""
    factor = torch.where(torch.arange(len(x)) % 16 < 8, 1.0, 1 + 2**-8)[:, None]
    write(y, product(w, x) * factor, start, stop)


def wrong(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
    """Compute sums that are the same in all batches, and 5% off."""
    write(y, product(w, x) * 1.05, start, stop)


def raising(*arguments: Any) -> None:
    raise RuntimeError("not on this CPU")


def test_a_path_that_holds_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, right)
    assert check(130, 96, torch.bfloat16) == LinearCheck(130, 96, "bfloat16", PLANTED)


@pytest.mark.parametrize("broken", [by_number, by_place, wrong, raising])
def test_a_path_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch, broken: Callable[..., None]) -> None:
    expected = paths(torch.bfloat16)[0]
    plant(monkeypatch, broken)
    assert check(130, 96, torch.bfloat16) == LinearCheck(130, 96, "bfloat16", expected, (PLANTED,))
    weight, x = torch.randn(130, 96).bfloat16(), torch.randn(5, 96).bfloat16()
    packed = checked_pack(weight)
    assert packed.path == expected
    torch.testing.assert_close(linear(x, packed), linear_ref(x, weight, None))
    assert "self-check of 1 shapes: 1 left a path that failed" in summary()


def test_the_plain_path_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "find_mistakes", lambda weight, path: iter(["other bits"]))
    found = check(64, 32, torch.bfloat16)
    assert found.path == "plain" and found.failed_paths == paths(torch.bfloat16)[:-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_path_of_our_own_holds_here(dtype: torch.dtype) -> None:
    own = [name for name, of in panels.KERNELS if of == dtype and name in real_isas()]
    weight = linear_mistakes.make_weight(200, 1100, dtype)
    assert [mistake for name in own for mistake in linear_mistakes.find_mistakes(weight, name)] == []


@pytest.mark.parametrize("num_cores", [1, 2])
def test_numbers_of_rows_and_cores_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, num_cores: int) -> None:
    def by_cores(w: Any, x: Any, bias: Any, activation: int, times: Any, y: Any, start: int, stop: int) -> None:
        by_number(w, x, bias, activation, times, y, start, stop)
        if cores.num_cores() == 1:
            y[:] += 1

    plant(monkeypatch, by_cores)
    weight = linear_mistakes.make_weight(64, 32, torch.bfloat16)
    with cores.use_cores(2):
        found = list(linear_mistakes.find_mistakes(weight, PLANTED, num_rows=(3, 32, 33, 40), core_counts=(num_cores,)))
    assert found[0] == "other bits for 3, 32 rows than for 40"
    assert ("other bits on 1 of 2 cores than on all" in found) == (num_cores == 1)


def test_a_library_is_asked_for_many_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may use another kernel from some hundreds of rows on."""
    multiply = onednn.multiply

    def other_for_many(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return multiply(x, *rest) * (1 if len(x) < 300 else 1 + 2**-20)

    monkeypatch.setattr(onednn, "multiply", other_for_many)
    monkeypatch.setattr(f"{linear_module}.isas", lambda: ())
    assert check(130, 96, torch.float32) == LinearCheck(130, 96, "float32", "plain", ("onednn",))


def test_what_is_used_can_be_asked() -> None:
    first = check(64, 32, torch.float32)
    checked_pack(torch.randn(16, 8).bfloat16())
    assert results() == [first, LinearCheck(16, 8, "bfloat16", paths(torch.bfloat16)[0])]
    assert summary() == (
        f"float32 products: {first.path}, bfloat16 products: {paths(torch.bfloat16)[0]}; self-check of 2 shapes passed"
    )


def searched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list of the shapes that are checked from now on by measuring."""
    shapes = []
    find = self_check._find_path

    def note(layer: Layer, *rest: Any) -> tuple[LinearCheck, bool]:
        shapes.append((layer.out_features, layer.in_features))
        return find(layer, *rest)

    monkeypatch.setattr(self_check, "_find_path", note)
    return shapes


def start_anew(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(self_check, "_results", {})
    keep_results_in(folder)


def test_results_outlive_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, by_number)
    folder = tmp_path / "new" / "cache"
    start_anew(monkeypatch, folder)
    before = [check(64, 32, torch.bfloat16), check(64, 48, torch.float32)]
    start_anew(monkeypatch, folder)
    shapes = searched(monkeypatch)
    assert [check(64, 32, torch.bfloat16), check(64, 48, torch.float32)] == before
    assert before[0].failed_paths == (PLANTED,) and shapes == []
    check(64, 64, torch.bfloat16)
    assert shapes == [(64, 64)]
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_a_result_of_an_exception_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = paths(torch.bfloat16)[0]

    def lack_memory(*arguments: Any) -> None:
        raise MemoryError

    plant(monkeypatch, lack_memory)
    start_anew(monkeypatch, tmp_path)
    shapes = searched(monkeypatch)
    for _ in range(2):
        assert check(64, 32, torch.bfloat16) == LinearCheck(64, 32, "bfloat16", expected, (PLANTED,))
    assert shapes == [(64, 32)] and list(tmp_path.iterdir()) == []
    monkeypatch.setitem(panels.KERNELS, (PLANTED, torch.bfloat16), panels.Kernel(right, torch.float32))
    start_anew(monkeypatch, tmp_path)
    assert check(64, 32, torch.bfloat16).path == PLANTED


def is_believed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> bool:
    """Return whether a new process uses a shape's result from the folder."""
    start_anew(monkeypatch, folder)
    shapes = searched(monkeypatch)
    check(64, 32, torch.bfloat16)
    return shapes == []


def test_results_of_another_machine_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_believed(monkeypatch, tmp_path) and is_believed(monkeypatch, tmp_path)
    monkeypatch.setattr(kept_checks, "_cpu", lambda: "another CPU")
    assert not is_believed(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "NUMBA_CPU_NAME",
        "NUMBA_CPU_FEATURES",
        "ONEDNN_MAX_CPU_ISA",
        "DNNL_MAX_CPU_ISA",
        "MKL_ENABLE_INSTRUCTIONS",
        "MKL_CBWR",
    ],
)
def test_results_in_another_environment_are_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert not is_believed(monkeypatch, tmp_path)
    monkeypatch.setenv(name, "another")
    assert not is_believed(monkeypatch, tmp_path)


@pytest.mark.parametrize("name", kept_checks.SOURCES)
def test_results_of_another_kernel_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert not is_believed(monkeypatch, tmp_path / "results")
    shutil.copytree(kept_checks.FOLDER, tmp_path / "sources")
    monkeypatch.setattr(kept_checks, "FOLDER", tmp_path / "sources")
    assert is_believed(monkeypatch, tmp_path / "results")
    shutil.copytree(kept_checks.FOLDER, tmp_path / "changed")
    with (tmp_path / "changed" / name).open("a") as file:
        file.write("# changed\n")
    monkeypatch.setattr(kept_checks, "FOLDER", tmp_path / "changed")
    assert not is_believed(monkeypatch, tmp_path / "results")


def test_all_that_a_product_is_computed_with_counts() -> None:
    """Every file that linear layers import is among the sources, except for those that change no bit."""
    reached, left = set(), ["linear.py", "quantized.py"]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            left += [f"{found}.py" for found in imported(kept_checks.FOLDER / name)]
    assert reached - set(kept_checks.SOURCES) == {
        "thread_pool.py",
        "job_pool.py",
        "launch.py",
        "atomics.py",
        "huge_pages.py",
        "isa.py",
        "code_cache.py",
    }


def imported(file: Path) -> list[str]:
    """Return the modules of the same package that a file imports."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "moray.kernels.cpu":
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moray.kernels.cpu."):
            found.append(node.module.rsplit(".", 1)[1])
    return found


@pytest.mark.parametrize("said", ['"avx9"', "3", '"plain"'])
def test_a_kept_result_that_cannot_be_true_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """The results name an unknown path, no path, and a path before which others would have had to fail."""
    start_anew(monkeypatch, tmp_path)
    found = check(64, 32, torch.bfloat16)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace(f'"{found.path}"', said))
    start_anew(monkeypatch, tmp_path)
    assert check(64, 32, torch.bfloat16) == found


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"bfloat16 [64, 32]": 3}', '{"bfloat16 [64, 32]": {"path": "plain"}}', "\x00\xff"]
)
def test_a_damaged_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    start_anew(monkeypatch, tmp_path)
    found = check(64, 32, torch.bfloat16)
    (file,) = tmp_path.iterdir()
    file.write_bytes(text.encode("latin-1"))
    start_anew(monkeypatch, tmp_path)
    assert check(64, 32, torch.bfloat16) == found
    assert json.loads(file.read_text()) == {
        "bfloat16 [64, 32]": {
            "out_features": 64,
            "in_features": 32,
            "dtype": "bfloat16",
            "path": found.path,
            "failed_paths": [],
            "weights": "",
        }
    }


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    start_anew(monkeypatch, tmp_path / "file" / "cache")
    assert check(64, 32, torch.bfloat16).path == paths(torch.bfloat16)[0]
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    start_anew(monkeypatch, tmp_path)
    assert check(64, 32, torch.bfloat16).path == paths(torch.bfloat16)[0]
    tmp_path.chmod(stat.S_IRWXU)


INT4 = Quantization("int4", 32, True)


@pytest.mark.parametrize("factor", [1.0, 1.05])
def test_a_path_of_quantized_weights_is_checked_too(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    expected = quantized.paths("int4", torch.bfloat16)[0]
    works = quantized.KERNELS[expected, "int4", True]

    def run(weight: Any, *rest: Any) -> None:
        codes, scales, zeros, group_steps, lengths = weight
        works.run((codes, scales * np.float32(factor), zeros, group_steps, lengths), *rest)

    monkeypatch.setattr(quantized, "isas", lambda: (PLANTED, *real_isas()))
    monkeypatch.setitem(quantized.KERNELS, (PLANTED, "int4", True), replace(works, run=run))
    found = check(130, 96, torch.bfloat16, INT4)
    name = "int4 in groups of 32 with zeros"
    path, failed = (PLANTED, ()) if factor == 1.0 else (expected, (PLANTED,))
    assert found == LinearCheck(130, 96, "bfloat16", path, failed, name)
    packed = checked_pack_quantized(*self_check.make_quantized(130, 96, INT4), torch.bfloat16)
    assert packed.path == path
    assert f"bfloat16 x {name} products: {path}; self-check of 1 shapes" in summary()


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8", "fp4"])
def test_every_path_of_quantized_weights_holds_here(kind: str) -> None:
    weight = self_check.make_quantized(100, 200, Quantization(kind, 64, False))
    for path in quantized.paths(kind, torch.bfloat16):
        assert list(self_check.find_quantized_mistakes(weight, torch.bfloat16, path)) == [], path


def test_results_of_quantized_weights_outlive_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_anew(monkeypatch, tmp_path)
    before = [check(64, 64, torch.bfloat16, of) for of in (None, INT4, Quantization("int4", 64, False))]
    start_anew(monkeypatch, tmp_path)
    shapes = searched(monkeypatch)
    after = [check(64, 64, torch.bfloat16, of) for of in (None, INT4, Quantization("int4", 64, False))]
    assert after == before and shapes == [] and len({str(one) for one in after}) == 3
