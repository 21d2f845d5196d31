"""Finds what would make the host wait for a GPU, on a machine without one: by what is asked of torch, not by time.

PyTorch waits where the host reads a number of the device, where the size of a result depends on such numbers, and where
something is copied from or to memory that is not pinned. All of it looks alike on the CPU and is seen here as it is
asked for. What Triton's interpreter does to run a kernel does not count.
"""

import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__}
# aten's: a result's size, or the host, wants to know what is in a tensor
SIZED_BY_CONTENT = {"nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave", "_local_scalar_dense"}


class HiddenWaits(TorchFunctionMode):
    """Records `function: what` of each wait while it is active; functions of `allowed` ("file.py:function") may."""

    def __init__(self, allowed: Collection[str]) -> None:
        super().__init__()
        self.found: list[str] = []
        self._allowed = allowed
        self._dispatch = _Dispatch(self)

    def __enter__(self) -> "HiddenWaits":
        self._dispatch.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._dispatch.__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            self.record(f"the host reads a tensor ({func.__name__})")
        elif func is Tensor.__setitem__ and _has_tensor(args[1]) and not isinstance(args[2], Tensor):
            self.record("a number is assigned by index")
        elif func in (Tensor.__getitem__, Tensor.__setitem__) and _has_list(args[1]):
            self.record("a list is an index")
        elif func in (torch.tensor, torch.as_tensor) and "device" in kwargs:
            self.record("a tensor is made on the device of what is in memory that is not pinned")
        elif func in (Tensor.to, Tensor.cuda) and not kwargs.get("non_blocking") and _names_device(args, kwargs):
            self.record("a tensor is copied between host and device, and waited for")
        return func(*args, **kwargs)

    def record(self, what: str) -> None:
        frame: FrameType | None = sys._getframe(2)
        places: list[str] = []
        while frame is not None:
            path, name = frame.f_code.co_filename, frame.f_code.co_name
            place = f"{path.rpartition('/')[2]}:{name}"
            if "/triton/runtime/" in path or place in self._allowed:
                return
            if "/engine/" in path or "/kernels/" in path:
                places.append(place)
            frame = frame.f_back
        self.found += [f"{place}: {what}" for place in places[:1]]


class _Dispatch(TorchDispatchMode):
    def __init__(self, waits: HiddenWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in SIZED_BY_CONTENT:
            self._waits.record(f"aten.{name}")
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_") and _has_mask(args[1]):
            self._waits.record("a mask is an index")
        return func(*args, **(kwargs or {}))


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _has_tensor(index: Any) -> bool:
    return any(isinstance(part, Tensor) for part in _parts(index))


def _has_mask(index: Any) -> bool:
    return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in index)


def _has_list(index: Any) -> bool:
    return any(isinstance(part, list) for part in _parts(index))


def _names_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return "device" in kwargs or any(isinstance(arg, torch.device | str) for arg in args[1:])
