"""Checkpoint: loads published weight files, tensor by tensor, into a model's own (fused) parameters.

Everything is checked against the headers before any data is read. Peak memory is the model.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from moray.engine.checkpoint.stored_weights import check_tensors
from moray.engine.checkpoint.weight_files import StoredTensor, find_weight_files, read_headers
from moray.engine.checkpoint.weight_reader import DTYPES, Progress, read_tensors
from moray.engine.errors import CheckpointError
from moray.engine.float_dtypes import WIDER_STORED_FLOATS
from moray.engine.partition import Rows
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
WHOLE_PARAMETERS: Mapping[str, Rows] = MappingProxyType({})
ALL_EXPERTS: Mapping[str, range] = MappingProxyType({})


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
        held: Mapping[str, Rows] = WHOLE_PARAMETERS,
        experts: Mapping[str, range] = ALL_EXPERTS,
    ) -> LoadReport:
        """Fill the model's parameters according to `tensor_map` (stored name -> Target), converting to their dtypes.

        progress: called with (bytes done, bytes in all) now and then, and at the end
        later:    tensors that are checked too, and left for `read`
        extras:   what is found in names of stored tensors that the model does not use
        held:     name of a parameter -> its rows that this model has, of parameters that it does not have as a whole;
                  no others are read
        experts:  name of a parameter -> its experts that this model has, of parameters that do not have all

        Raises CheckpointError naming every missing, extra, misshapen or wrongly typed tensor, before any is read; and
        while reading, if a file ends early or a value does not fit float16.
        """
        parts = {name: StoredPart(to.shape, WIDER_STORED_FLOATS) for name, to in tensor_map.items()} | dict(later or {})
        check_tensors(self.tensors, parts, extras, str(self.folder))
        regions = _regions(model, _of_experts(tensor_map, experts), held)
        for param in model.parameters():
            if not param.is_meta:
                advise_huge_pages(param)
        start = time.perf_counter()
        targets = [
            (tensor.rows(rows) if rows else tensor, region)
            for tensor in self.tensors.values()
            for rows, region in regions.get(tensor.name, ())
        ]
        num_bytes = read_tensors(targets, progress)
        return LoadReport(num_bytes, time.perf_counter() - start)

    def check(self, tensor_map: TensorMap) -> None:
        """Raise CheckpointError naming every tensor that is missing, extra, misshapen or of a wrong type."""
        parts = {name: StoredPart(target.shape, WIDER_STORED_FLOATS) for name, target in tensor_map.items()}
        check_tensors(self.tensors, parts, None, str(self.folder))

    def read(
        self, names: Iterable[str], device: torch.device, rows: Sequence[slice] | None = None
    ) -> dict[str, Tensor]:
        """Return those of the named tensors that are stored, as they are stored, in new memory on the device.

        rows: the rows of each that are read, one slice after the other; None = all

        Raises CheckpointError if a file ends early.
        """
        stored = sorted(
            (self.tensors[name] for name in names if name in self.tensors),
            key=lambda tensor: (tensor.file, tensor.begin),
        )
        read: dict[str, Tensor] = {}
        targets: list[tuple[StoredTensor, Tensor]] = []
        for tensor in stored:
            if rows is None:
                read[tensor.name] = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=device)
                targets.append((tensor, read[tensor.name]))
                continue
            pieces = [tensor.rows(part) for part in rows]
            shape = (sum(piece.shape[0] for piece in pieces), *tensor.shape[1:])
            read[tensor.name] = torch.empty(shape, dtype=DTYPES[tensor.dtype], device=device)
            first = 0
            for piece in pieces:
                targets.append((piece, read[tensor.name][first : first + piece.shape[0]]))
                first += piece.shape[0]
        read_tensors(targets)
        return read


def _of_experts(tensor_map: TensorMap, experts: Mapping[str, range]) -> TensorMap:
    """Return where the tensors of the experts that the model has go; see load_into."""
    found = {}
    for name, target in tensor_map.items():
        if target.param in experts:
            held, (expert, *rest) = experts[target.param], target.index
            assert isinstance(expert, int), f"{name} {target} is of no expert"
            if expert not in held:
                continue
            target = replace(target, index=(held.index(expert), *rest))
        found[name] = target
    return found


def _regions(
    model: nn.Module, tensor_map: TensorMap, held: Mapping[str, Rows]
) -> dict[str, list[tuple[slice | None, Tensor]]]:
    """Return stored name -> rows of the stored tensor, None for all, and the regions that they fill.

    Asserts that the regions cover all parameters exactly once. Parameters on the meta device are left out.
    """
    params = {name: param.detach() for name, param in model.named_parameters() if not param.is_meta}
    filled = dict.fromkeys(params, 0)
    regions: dict[str, list[tuple[slice | None, Tensor]]] = {}
    for name, target in tensor_map.items():
        param = params[target.param]
        if target.param in held:
            regions[name] = list(_held_regions(param, target, held[target.param]))
        else:
            regions[name] = [(None, param[target.index])]
        for rows, region in regions[name]:
            shape = target.shape if rows is None else (rows.stop - rows.start, *target.shape[1:])
            assert region.shape == shape and region.is_contiguous(), f"{name} {target} {rows} gives {region.shape}"
            filled[target.param] += region.numel()
    uneven = {name: (count, params[name].numel()) for name, count in filled.items() if count != params[name].numel()}
    assert not uneven, f"parameters not filled exactly once (elements mapped, elements there): {uneven}"
    return regions


def _held_regions(param: Tensor, target: Target, held: Rows) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a stored tensor that a parameter has, and the regions that they fill."""
    first = first_row(target)
    part = param[tuple(index for index in target.index if isinstance(index, int))]  # of an expert
    for of_stored, of_part in held.overlaps(first, first + target.shape[0]):
        yield of_stored, part[of_part]


def first_row(target: Target) -> int:
    """Return the first row, of the whole parameter, that a stored tensor fills."""
    rows = [part for part in target.index if isinstance(part, slice)]
    return rows[0].start or 0 if rows else 0
