"""Checkpoint: published weight files, streamed tensor by tensor into a model's own (fused) parameters.

Everything is checked against the headers before a byte of data is read. Peak memory is the model.
"""

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from engine.checkpoint.weight_files import StoredTensor, find_weight_files, read_header
from engine.checkpoint.weight_reader import DTYPES, Progress, read_tensors
from engine.errors import CheckpointError
from kernels.cpu.huge_pages import advise_huge_pages

# Tables and masks that older files carry and that are computed here.
IGNORED = re.compile(r"(^|\.)(rotary_emb\.\w+|masked_bias|causal_mask|attn\.bias)$")
MAX_ALIKE = 8  # tensors whose names differ by numbers only that are named one by one


@dataclass(frozen=True)
class Target:
    """Where one stored tensor goes.

    param:  dotted name of the model's parameter
    shape:  as stored
    index:  the region of the parameter that it fills, contiguous; () = all of it
    """

    param: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()


TensorMap = Mapping[str, Target]


@dataclass(frozen=True)
class LoadReport:
    """bytes: read from the files."""

    bytes: int
    seconds: float


class Checkpoint:
    """The weight files of a folder. `tensors` is every stored tensor by name, from the headers.

    Raises CheckpointError where the layout is not supported, a file is missing or cut short, or index and files differ.
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
        names = {path.name for path in self.folder.iterdir() if path.is_file()}
        indexed = find_weight_files(names, lambda name: (self.folder / name).read_bytes(), str(self.folder))
        self.files = tuple(self.folder / name for name in indexed)
        for file, promised in zip(self.files, indexed.values(), strict=True):
            header = read_header(file)
            if promised is not None and promised != header.keys():
                raise CheckpointError(
                    f"{file} and the index differ."
                    + _list("In the index only", promised - header.keys())
                    + _list("In the file only", header.keys() - promised)
                )
            self.tensors |= header

    def load_into(self, model: nn.Module, tensor_map: TensorMap, progress: Progress | None = None) -> LoadReport:
        """Fill the parameters that `tensor_map` (stored name -> Target) names, converting to their dtypes.

        progress: called with (bytes done, bytes in all) now and then, and at the end

        Raises CheckpointError naming every missing, extra, misshapen or wrongly typed tensor, before reading any;
        while reading, where a file ends early or a value does not fit float16.
        """
        self._check(tensor_map)
        regions = _regions(model, tensor_map)
        for param in model.parameters():
            advise_huge_pages(param)
        start = time.perf_counter()
        places = [(tensor, regions[tensor.name]) for tensor in self.tensors.values() if tensor.name in regions]
        num_bytes = read_tensors(places, progress)
        return LoadReport(num_bytes, time.perf_counter() - start)

    def _check(self, tensor_map: TensorMap) -> None:
        stored = {name: tensor for name, tensor in self.tensors.items() if name in tensor_map}
        misshapen = [
            f"{name} {list(tensor.shape)}, must be {list(tensor_map[name].shape)}"
            for name, tensor in stored.items()
            if tensor.shape != tensor_map[name].shape
        ]
        problems = (
            _list("Missing", tensor_map.keys() - stored.keys())
            + _list(
                "Not of this model", (name for name in self.tensors.keys() - stored.keys() if not IGNORED.search(name))
            )
            + _list("Of another shape", misshapen)
            + _list(
                f"Of a dtype other than {', '.join(DTYPES)}",
                (f"{name} {tensor.dtype}" for name, tensor in stored.items() if tensor.dtype not in DTYPES),
            )
        )
        if problems:
            raise CheckpointError(f"The weights in {self.folder} do not fit its config.json.{problems}")


def _regions(model: nn.Module, tensor_map: TensorMap) -> dict[str, Tensor]:
    """Stored name -> the region it fills; together the regions are all of the model's parameters, asserted."""
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


def _list(title: str, names: Iterable[str]) -> str:
    """A line of names; many that differ by numbers only are named by their pattern, their count and the first."""
    alike: dict[str, list[str]] = {}
    for name in sorted(
        names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    ):
        alike.setdefault(re.sub(r"\d+(?=\.)", "*", name), []).append(name)
    items = [
        text
        for pattern, group in alike.items()
        for text in (group if len(group) <= MAX_ALIKE else [f"{pattern} ({len(group)} tensors, the first {group[0]})"])
    ]
    return f"\n{title}: {', '.join(items)}." if items else ""
