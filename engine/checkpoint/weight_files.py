"""Find the files of a folder that hold the weights, and read their headers. No torch: remote folders use this too.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, JSON header, data).
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath

from moray.engine.checkpoint.json_file import check_no_pointer, parse_json
from moray.engine.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# dtype that a model can be loaded from -> bytes; those of codes are for quantized weights only
ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
HEAD_BYTES = 128  # bytes of a file that are read first: the header's length, or a pointer left by git-lfs
MAX_LISTED_ALIKE = 8  # up to this many tensors whose names differ only in numbers are listed one by one
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".safetensors")


@dataclass(frozen=True)
class Place:
    """Says where the rows of a tensor are in a stored matrix that has others too, or has them as columns.

    first, step:  rows (or columns) first, first + step, .. of the matrix are those of the tensor
    total:        rows (or columns) of the matrix
    are_columns:  the matrix is stored as x W multiplies it, [inputs, outputs]
    """

    first: int
    step: int
    total: int
    are_columns: bool


@dataclass(frozen=True)
class StoredTensor:
    """Describes one tensor of a weight file.

    file:        the path of the file, or its address if it is remote
    dtype:       the format's name, such as "BF16"
    begin, end:  the range of its bytes, from the start of the file; those of the whole matrix if it has a place
    place:       where its rows are in the bytes; None = they are the bytes, one after the other
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    place: Place | None = None

    @property
    def num_bytes(self) -> int:
        """Return how many bytes its numbers take."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    def rows(self, rows: slice) -> "StoredTensor":
        """Return some rows (indices of the first dimension) as a tensor of their own. `rows` has start and stop."""
        if self.place is not None:
            place = replace(self.place, first=self.place.first + rows.start * self.place.step)
            return replace(self, shape=(rows.stop - rows.start, *self.shape[1:]), place=place)
        row_bytes = (self.end - self.begin) // self.shape[0]
        begin, end = self.begin + rows.start * row_bytes, self.begin + rows.stop * row_bytes
        return replace(self, shape=(rows.stop - rows.start, *self.shape[1:]), begin=begin, end=end)


def find_weight_files(
    names: Collection[str], read: Callable[[str], bytes], where: str
) -> dict[str, frozenset[str] | None]:
    """Return file name -> the names of its tensors in the index; None means that there is no index.

    names:  the files in the folder, relative to it
    read:   returns the content of a file
    where:  the folder, for errors

    Raises CheckpointError if there is neither model.safetensors nor an index, if both exist and differ, or if the index
    names a missing file.
    """
    if INDEX not in names:
        if SINGLE not in names:
            raise CheckpointError(_no_weights(names, where))
        return {SINGLE: None}
    index = parse_json(read(INDEX), f"{where}/{INDEX}").get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(v, str) for v in index.values()):
        raise CheckpointError(f"{where}/{INDEX} has no weight_map from tensor names to file names.")
    files: dict[str, set[str]] = {}
    for tensor, file in index.items():
        files.setdefault(file, set()).add(tensor)
    outside = sorted(file for file in files if PurePosixPath(file).name != file or not file.endswith(".safetensors"))
    if outside:
        raise CheckpointError(f"{where}/{INDEX} names {outside[0]!r}; only .safetensors files next to it are read.")
    missing = sorted(file for file in files if file not in names)
    if missing:
        raise CheckpointError(f"{where}/{INDEX} names files that are not there: {', '.join(missing)}.")
    if SINGLE in names and SINGLE not in files:
        raise CheckpointError(f"{where} has both {SINGLE} and {INDEX}; which one is meant? Remove the other.")
    return {file: frozenset(tensors) for file, tensors in sorted(files.items())}


def _no_weights(names: Collection[str], where: str) -> str:
    others = sorted(name for name in names if name.endswith(OTHER_FORMATS))
    found = f"found only {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}" if others else "found no weights"
    return (
        f"{where}: {found}. Weights are read from {SINGLE} or {INDEX} and its files, never from pickles; "
        "save the model again with save_pretrained."
    )


def read_headers(
    indexed: Mapping[str, frozenset[str] | None],
    sizes: Mapping[str, int],
    read: Callable[[str, int, int], bytes],
    where: str,
) -> dict[str, StoredTensor]:
    """Return the tensors by name, from the headers of all weight files, file by file in the order of their bytes.

    indexed:  file name -> names of its tensors in the index, as find_weight_files returns it
    sizes:    file name -> bytes of the file
    read:     returns some bytes of a file, by its name, their offset and their number
    where:    the folder

    Raises CheckpointError if a file is cut short or of another format, or if it and the index differ.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, expected in indexed.items():
        file = f"{where}/{name}"
        header = _read_header(partial(read, name), sizes[name], file)
        if expected is not None and expected != header.keys():
            raise CheckpointError(
                f"{file} and the index differ."
                + list_names("In the index only", expected - header.keys())
                + list_names("In the file only", header.keys() - expected)
            )
        tensors |= header
    return tensors


def measure_header(read: Callable[[int, int], bytes], size: int, file: str) -> int:
    """Return how many bytes of a .safetensors file come before its data: the header's length and the header.

    read:  returns some bytes of the file, by their offset and their number
    size:  bytes of the file
    file:  its name for errors

    Raises CheckpointError if the file is cut short there or of another format.
    """
    head = read(0, min(size, HEAD_BYTES))
    check_no_pointer(head, file)
    length = int.from_bytes(head[:8], "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{file} is not a whole safetensors file: of {size:,} bytes, its header alone should have {length:,}. "
            "Fetch it again."
        )
    return 8 + length


def _read_header(read: Callable[[int, int], bytes], size: int, file: str) -> dict[str, StoredTensor]:
    begin = measure_header(read, size, file)
    header = parse_json(read(8, begin - 8), f"{file} (header)")
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, name, entry, begin) for name, entry in header.items()}
    end = max((tensor.end for tensor in tensors.values()), default=begin)
    if end != size:
        raise CheckpointError(
            f"{file} is cut short or damaged: its header says {end:,} bytes, it has {size:,}. Fetch it again."
        )
    return dict(sorted(tensors.items(), key=lambda item: item[1].begin))


def _stored(file: str, name: str, entry: object, data_begin: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            is_shape = all(isinstance(size, int) and size >= 0 for size in shape)
            is_whole = dtype not in ITEM_SIZE or (is_shape and end - begin == math.prod(shape) * ITEM_SIZE[dtype])
            if is_shape and is_whole and 0 <= begin <= end:
                return StoredTensor(name, file, dtype, tuple(shape), data_begin + begin, data_begin + end)
    raise CheckpointError(f"{file}: the header entry of {name} is invalid: {json.dumps(entry)[:200]}.")


def by_number(name: str) -> list[int | str]:
    """Return the key of an order in which layer 2 comes before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def list_names(title: str, names: Iterable[str]) -> str:
    """Return a line of names. Many names that differ only in numbers are shown as pattern, count and first name."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names, key=by_number):
        alike.setdefault(re.sub(r"\d+(?=\.)", "*", name), []).append(name)
    items = [
        text
        for pattern, group in alike.items()
        for text in (
            group if len(group) <= MAX_LISTED_ALIKE else [f"{pattern} ({len(group)} tensors, the first {group[0]})"]
        )
    ]
    return f"\n{title}: {', '.join(items)}." if items else ""
