"""Checkpoint: loads published weight files, tensor by tensor, into a model's own (fused) parameters.

Everything is checked against the headers before any data is read. Peak memory is the model.
"""

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moray.engine.checkpoint.stored_weights import check_tensors
from moray.engine.checkpoint.weight_files import FLOAT_DTYPES, StoredTensor, find_weight_files, read_headers
from moray.engine.checkpoint.weight_reader import DTYPES, Progress, read_tensors
from moray.engine.errors import CheckpointError
from moray.engine.quantization.stored_part import StoredPart
from moray.kernels.cpu.huge_pages import advise_huge_pages


@dataclass(frozen=True)
class Target:
    """Names the part of a parameter that one stored tensor fills.

    param:  dotted name of the model's parameter
    shape:  shape of the stored tensor
    index:  the region of the parameter, which is contiguous; () = all of it
    """

    param: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()


TensorMap = Mapping[str, Target]


@dataclass(frozen=True)
class LoadReport:
    """States how much was read, and how long it took.

    bytes: read from the files
    """

    bytes: int
    seconds: float


class Checkpoint:
    """Reads the weight files of a folder.

    tensors: every stored tensor by name, from the headers

    Raises CheckpointError if the layout is not supported, a file is missing or cut short, or index and files differ.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; a model is a folder with config.json and weights in it.")
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        try:
            self._read_headers()
        except OSError as error:
            raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}.") from None

    def _read_headers(self) -> None:
        sizes = {path.name: path.stat().st_size for path in self.folder.iterdir() if path.is_file()}
        indexed = find_weight_files(sizes, lambda name: (self.folder / name).read_bytes(), str(self.folder))
        self.files = tuple(self.folder / name for name in indexed)
        self.tensors = read_headers(indexed, sizes, self._read, str(self.folder))

    def _read(self, name: str, offset: int, length: int) -> bytes:
        with open(self.folder / name, "rb") as stream:
            stream.seek(offset)
            return stream.read(length)

    def load_into(
        self,
        model: nn.Module,
        tensor_map: TensorMap,
        progress: Progress | None = None,
        later: Mapping[str, StoredPart] | None = None,
        extras: re.Pattern[str] | None = None,
    ) -> LoadReport:
        """Fill the model's parameters according to `tensor_map` (stored name -> Target), converting to their dtypes.

        progress: called with (bytes done, bytes in all) now and then, and at the end
        later:    tensors that are checked too, and left for `read`
        extras:   what is found in names of stored tensors that the model does not use

        Raises CheckpointError naming every missing, extra, misshapen or wrongly typed tensor, before any is read; and
        while reading, if a file ends early or a value does not fit float16.
        """
        parts = {name: StoredPart(to.shape, FLOAT_DTYPES) for name, to in tensor_map.items()} | dict(later or {})
        check_tensors(self.tensors, parts, extras, str(self.folder))
        regions = _regions(model, tensor_map)
        for param in model.parameters():
            if not param.is_meta:
                advise_huge_pages(param)
        start = time.perf_counter()
        targets = [(tensor, regions[tensor.name]) for tensor in self.tensors.values() if tensor.name in regions]
        num_bytes = read_tensors(targets, progress)
        return LoadReport(num_bytes, time.perf_counter() - start)

    def check(self, tensor_map: TensorMap) -> None:
        """Raise CheckpointError naming every tensor that is missing, extra, misshapen or of a wrong type."""
        parts = {name: StoredPart(target.shape, FLOAT_DTYPES) for name, target in tensor_map.items()}
        check_tensors(self.tensors, parts, None, str(self.folder))

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """Return those of the named tensors that are stored, as they are stored, in new memory on the device.

        Raises CheckpointError if a file ends early.
        """
        stored = sorted(
            (self.tensors[name] for name in names if name in self.tensors),
            key=lambda tensor: (tensor.file, tensor.begin),
        )
        read = {tensor.name: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=device) for tensor in stored}
        read_tensors([(tensor, read[tensor.name]) for tensor in stored])
        return read


def _regions(model: nn.Module, tensor_map: TensorMap) -> dict[str, Tensor]:
    """Return stored name -> the region that it fills; asserts that the regions cover all parameters exactly once.

    Parameters on the meta device are left out.
    """
    params = {name: param.detach() for name, param in model.named_parameters() if not param.is_meta}
    regions = {name: params[target.param][target.index] for name, target in tensor_map.items()}
    filled = dict.fromkeys(params, 0)
    for name, target in tensor_map.items():
        region = regions[name]
        assert region.shape == target.shape and region.is_contiguous(), f"{name} {target} gives {region.shape}"
        filled[target.param] += region.numel()
    uneven = {name: (count, params[name].numel()) for name, count in filled.items() if count != params[name].numel()}
    assert not uneven, f"parameters not filled exactly once (elements mapped, elements there): {uneven}"
    return regions
