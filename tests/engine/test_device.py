import pytest
import torch

from engine.device import CPU, choose_device
from engine.errors import UserError


def test_the_cpu() -> None:
    device = choose_device("cpu")
    assert device == CPU and device.backend == "torch"
    assert device.available_bytes > 2**20
    assert device.name.strip()


def test_auto_takes_a_cuda_device_where_there_is_one() -> None:
    assert choose_device("auto").torch.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(UserError, match="sees no CUDA device; use auto or cpu"):
        choose_device("cuda")


def test_another_device() -> None:
    with pytest.raises(UserError, match="'tpu'; it can be auto, cpu or cuda"):
        choose_device("tpu")
