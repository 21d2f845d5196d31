"""Which files of a folder hold the weights, and what their headers say. No torch: remote folders use it too.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header length, JSON header, data).
"""

import json
import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from engine.checkpoint.json_file import check_no_pointer, parse_json
from engine.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # what a model is loaded from
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file. begin, end: its bytes, counted from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def find_weight_files(
    names: Collection[str], read: Callable[[str], bytes], where: str
) -> dict[str, frozenset[str] | None]:
    """File name -> the tensors that the index says it holds (None: no index, all of it).

    names:  the files there are, relative to the folder
    read:   gives the content of one of them
    where:  the folder, for errors

    Raises CheckpointError where there is no model.safetensors and no index, where both are and differ, or where the
    index names a file that is not there.
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
        raise CheckpointError(f"{where}/{INDEX} names {outside[0]!r}; only .safetensors files beside it are read.")
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


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a .safetensors file by name, in the order of their bytes.

    Raises CheckpointError where the file is cut short or is something else.
    """
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        head = stream.read(8)
        check_no_pointer(head + stream.read(120), str(file))
        length = int.from_bytes(head, "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{file} is not a whole safetensors file: of {size:,} bytes, its header alone should have {length:,}. "
                "Fetch it again."
            )
        stream.seek(8)
        header = parse_json(stream.read(length), f"{file} (header)")
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, name, entry, 8 + length) for name, entry in header.items()}
    end = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise CheckpointError(
            f"{file} is cut short or damaged: its header says {end:,} bytes, it has {size:,}. Fetch it again."
        )
    return dict(sorted(tensors.items(), key=lambda item: item[1].begin))


def _stored(file: Path, name: str, entry: object, data_begin: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            is_shape = all(isinstance(size, int) and size >= 0 for size in shape)
            is_whole = dtype not in ITEM_SIZE or (is_shape and end - begin == math.prod(shape) * ITEM_SIZE[dtype])
            if is_shape and is_whole and 0 <= begin <= end:
                return StoredTensor(name, file, dtype, tuple(shape), data_begin + begin, data_begin + end)
    raise CheckpointError(f"{file}: the header entry of {name} makes no sense: {json.dumps(entry)[:200]}.")
