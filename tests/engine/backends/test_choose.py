"""Tests of which backend is chosen, and of the messages when there is no such device."""

import logging

import pytest
import torch

from moray.engine.backends.choose import OVERRIDE, choose_backend
from moray.engine.backends.cpu.backend import CPU
from moray.engine.errors import DeviceError, UserError
from moray.engine.platform import cuda_driver


def test_the_cpu() -> None:
    backend = choose_backend("cpu")
    assert backend is CPU and backend.name == "cpu"
    assert backend.available_bytes > 2**20
    assert backend.device_name.strip()


def test_auto_takes_a_cuda_device_where_there_is_one() -> None:
    assert choose_backend("auto").name == ("cuda" if torch.cuda.is_available() else "cpu")


def test_another_device() -> None:
    with pytest.raises(UserError, match="'tpu'; it can be auto, cpu or cuda"):
        choose_backend("tpu")


def test_the_environment_goes_before_what_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(OVERRIDE, "cpu")
    with caplog.at_level(logging.WARNING):
        assert choose_backend("cuda") is CPU
    assert "MORAY_DEVICE is cpu, which overrides the device cuda" in caplog.text
    monkeypatch.setenv(OVERRIDE, "gpu")
    with pytest.raises(UserError, match="'gpu'; it can be"):
        choose_backend("cpu")


@pytest.mark.parametrize(
    ("cuda", "driver", "visible", "says"),
    [
        (None, "580.65.06", None, r"is built without CUDA, the NVIDIA driver is 580.65.06. Install a torch with CUDA"),
        (None, None, None, r"is built without CUDA, no NVIDIA driver is found. For .* any other set MORAY_DEVICE=cpu"),
        ("13.0", None, None, r"for CUDA 13.0, no NVIDIA driver is found. Install the driver, 580 or newer; in a cont"),
        ("13.0", "570.86", None, r"the NVIDIA driver is 570.86. CUDA 13 needs driver 580 or newer: update it, or"),
        ("12.8", "570.86", "", r"for CUDA 12.8, the NVIDIA driver is 570.86. CUDA_VISIBLE_DEVICES is '': it must name"),
        ("12.8", "570.86", None, r"CUDA reports: .*nvidia-smi shows whether the GPU works"),
    ],
)
def test_cuda_where_there_is_none_says_why(
    cuda: str | None, driver: str | None, visible: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cuda_driver, "driver_version", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def broken() -> None:
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch.cuda, "init", broken)
    with pytest.raises(DeviceError, match=says):
        choose_backend("cuda")


def test_an_amd_card_is_refused_with_what_is_supported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(DeviceError, match=r"built for ROCm 7.0.* The kernels run on NVIDIA .* set MORAY_DEVICE=cpu"):
        choose_backend("cuda")
    assert choose_backend("auto") is CPU and "so the CPU computes" in caplog.text
