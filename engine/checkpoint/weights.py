"""Checkpoint: loads published weight files, tensor by tensor, into a model's own (fused) parameters.

Everything is checked against the headers before any data is read. Peak memory is the model.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from moray.engine.checkpoint.weight_files import StoredTensor, find_weight_files, list_names, read_headers
from moray.engine.checkpoint.weight_reader import DTYPES, Progress, read_tensors
from moray.engine.errors import CheckpointError
from moray.kernels.cpu.huge_pages import advise_huge_pages

# Tables and masks in older files, which the model computes itself.
IGNORED = re.compile(r"(^|\.)(rotary_emb\.\w+|masked_bias|causal_mask|attn\.bias)$")


@dataclass(frozen=True)
class Target:
    """The part of a parameter that one stored tensor fills.

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
    """The weight files of a folder.

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

    def load_into(self, model: nn.Module, tensor_map: TensorMap, progress: Progress | None = None) -> LoadReport:
        """Fill the model's parameters according to `tensor_map` (stored name -> Target), converting to their dtypes.

        progress: called with (bytes done, bytes in all) now and then, and at the end

        Raises CheckpointError naming every missing, extra, misshapen or wrongly typed tensor, before any is read; and
        while reading, if a file ends early or a value does not fit float16.
        """
        self._check(tensor_map)
        regions = _regions(model, tensor_map)
        for param in model.parameters():
            advise_huge_pages(param)
        start = time.perf_counter()
        targets = [(tensor, regions[tensor.name]) for tensor in self.tensors.values() if tensor.name in regions]
        num_bytes = read_tensors(targets, progress)
        return LoadReport(num_bytes, time.perf_counter() - start)

    def _check(self, tensor_map: TensorMap) -> None:
        stored = {name: tensor for name, tensor in self.tensors.items() if name in tensor_map}
        misshapen = [
            f"{name} {list(tensor.shape)}, must be {list(tensor_map[name].shape)}"
            for name, tensor in stored.items()
            if tensor.shape != tensor_map[name].shape
        ]
        problems = (
            list_names("Missing", tensor_map.keys() - stored.keys())
            + list_names(
                "Not of this model", (name for name in self.tensors.keys() - stored.keys() if not IGNORED.search(name))
            )
            + list_names("Of another shape", misshapen)
            + list_names(
                f"Of a dtype other than {', '.join(DTYPES)}",
                (f"{name} {tensor.dtype}" for name, tensor in stored.items() if tensor.dtype not in DTYPES),
            )
        )
        if problems:
            raise CheckpointError(f"The weights in {self.folder} do not fit its config.json.{problems}")


def _regions(model: nn.Module, tensor_map: TensorMap) -> dict[str, Tensor]:
    """Return stored name -> the region that it fills; asserts that the regions cover all parameters exactly once."""
    params = {name: param.detach() for name, param in model.named_parameters()}
    regions = {name: params[target.param][target.index] for name, target in tensor_map.items()}
    filled = dict.fromkeys(params, 0)
    for name, target in tensor_map.items():
        region = regions[name]
        assert region.shape == target.shape and region.is_contiguous(), f"{name} {target} gives {region.shape}"
        filled[target.param] += region.numel()
    uneven = {name: (count, params[name].numel()) for name, count in filled.items() if count != params[name].numel()}
    assert not uneven, f"parameters not filled exactly once (elements mapped, elements there): {uneven}"
    return regions
