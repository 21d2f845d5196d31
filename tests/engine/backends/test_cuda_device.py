"""Tests of what is checked and measured on a CUDA device, with CUDA's answers made up."""

import pytest
import torch

from moray.engine.backends.cuda import device as device_module
from moray.engine.backends.cuda.backend import CudaBackend
from moray.engine.backends.cuda.device import check_capability, check_gpus, wait_for_memory
from moray.engine.errors import DeviceError
from moray.kernels.workspace import ATTENTION_BYTES

CUDA = torch.device("cuda", 0)
GIB = 1 << 30


@pytest.mark.parametrize(
    ("capability", "dtype", "says"),
    [
        ((7, 0), None, "it has compute capability 7.0; the kernels need 7.5, and 8.0 for bfloat16"),
        ((7, 5), torch.bfloat16, "it has compute capability 7.5; bfloat16 needs 8.0. Use float16 or float32"),
        ((7, 5), torch.float16, None),
        ((7, 5), None, None),
        ((8, 0), torch.bfloat16, None),
        ((12, 0), torch.bfloat16, None),
    ],
)
def test_cards_that_are_too_old(
    capability: tuple[int, int], dtype: torch.dtype | None, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    if says is None:
        return check_capability(CUDA, dtype)
    with pytest.raises(DeviceError, match=f"no kernel runs on Some Card: {says}"):
        check_capability(CUDA, dtype)


@pytest.mark.parametrize(
    ("names", "capability", "says"),
    [
        (["H100"], (9, 0), r"is 4 and this process sees 1 GPU; give it 4, or lower engine.tensor_parallel to 1\."),
        (["H100"] * 3, (9, 0), r"is 4 and this process sees 3 GPUs; give it 4, or lower .* to 2\."),
        (["H100", "H100", "A100", "H100"], (9, 0), "of several kinds: GPU 0 is H100, GPU 2 is A100"),
        (["V100"] * 4, (7, 0), "no kernel runs on V100: it has compute capability 7.0"),
        (["H100"] * 4 + ["A100"], (9, 0), None),
    ],
)
def test_each_rank_needs_a_gpu_like_the_others(
    names: list[str], capability: tuple[int, int], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[getattr(device, "index", device)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if says is None:
        return check_gpus(4)
    with pytest.raises(DeviceError, match=says):
        check_gpus(4)


def test_memory_that_comes_back_late_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device_module, "POLL_S", 0.0)
    free = iter([10 * GIB, 20 * GIB, 75 * GIB, 79 * GIB])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 80 * GIB))
    wait_for_memory(CUDA)
    assert next(free) == 79 * GIB and not caplog.records
    monkeypatch.setattr(device_module, "FREE_WITHIN_S", 0.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    wait_for_memory(CUDA)
    assert "20.0 of 80.0 GiB of the GPU's memory are in use by other processes" in caplog.text


def test_the_peak_of_a_step_is_what_it_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of PyTorch is emptied before and after, and attention's workspace is added."""
    calls: list[str] = []
    allocated = {"now": 100, "peak": 999}

    def reset(device: torch.device) -> None:
        calls.append("reset")
        allocated["peak"] = allocated["now"]

    def step() -> None:
        calls.append("step")
        allocated["peak"] = 350

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["peak"])
    assert CudaBackend(CUDA).measure_peak(step) == 250 + ATTENTION_BYTES
    assert calls == ["empty", "reset", "step", "empty"]
