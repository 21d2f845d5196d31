"""Write a quantized copy of a checkpoint, tensor by tensor: the weights that quantization on load would give."""

import fcntl
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moray.engine.checkpoint.expert_stacks import split_stacks
from moray.engine.checkpoint.families import FAMILIES
from moray.engine.checkpoint.json_file import read_json
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.checkpoint.weight_files import INDEX, ITEM_SIZE, OTHER_FORMATS, StoredTensor
from moray.engine.checkpoint.weights import Checkpoint
from moray.engine.errors import NodeError, OutputError
from moray.engine.models import ARCHITECTURES
from moray.engine.quantization.on_load import OnLoad
from moray.engine.quantization.scheme import OnLoadKind
from moray.engine.quantization.written import written_config, written_shapes, written_tensors
from moray.engine.runner.quantized_weights import SUFFIX, QuantizedWeights

CONFIG = "config.json"
SHARD_BYTES = 5_000_000_000  # most bytes of a weight file, except of one tensor that is larger
ALIGNMENT = 8

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Written:
    """States what was written. num_bytes: of the weights"""

    num_bytes: int
    num_files: int


@dataclass(frozen=True)
class _Entry:
    """Describes a tensor of the new checkpoint. begin: its first byte after the header of its file"""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass
class _Shard:
    """Lists the tensors of one file of the new checkpoint."""

    entries: list[_Entry] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)


def quantize_checkpoint(
    folder: Path, out: Path, kind: OnLoadKind, progress: Progress | None = None, shard_bytes: int = SHARD_BYTES
) -> Written:
    """Write a copy of a checkpoint whose weights of experts and attention are quantized, with its other files.

    Memory is that of the largest tensor, whatever the model's size. The folder gets its name when it is complete: until
    then it is hidden beside it, and without config.json.

    progress:     called with (bytes of the original done, bytes in all)
    shard_bytes:  most bytes of a weight file

    Raises CheckpointError if the checkpoint cannot be loaded or is quantized already, OutputError if `out` exists, and
    NodeError if it cannot be written.
    """
    config = with_quantization(read_model_config(folder), kind, str(folder))
    scheme = config.quantization
    assert scheme is not None
    checkpoint = Checkpoint(folder)
    checkpoint.tensors = split_stacks(checkpoint.tensors, config.architecture)
    tensor_map = ARCHITECTURES[config.architecture].tensor_map(config)
    checkpoint.check(tensor_map)
    quantized = QuantizedWeights(scheme, tensor_map).parts.keys()
    stored = list(checkpoint.tensors.values())
    shards, places = _plan(stored, quantized, lambda shape: written_shapes(scheme, shape), shard_bytes)
    format_, total = OnLoad(scheme), sum(tensor.num_bytes for tensor in stored)
    with _complete_or_hidden(out, sum(shard.num_bytes for shard in shards)) as hidden:
        files = [hidden / _file_name(i, len(shards)) for i in range(len(shards))]
        data_begins = [_write_header(file, shard) for file, shard in zip(files, shards, strict=True)]
        done = 0
        for tensor in stored:
            read = checkpoint.read([tensor.name], torch.device("cpu"))
            if tensor.name in quantized:
                module = tensor.name.removesuffix(SUFFIX)
                weight = format_.assemble(module, (tensor.shape[0], tensor.shape[1]), read)
                read = {f"{module}.{suffix}": part for suffix, part in written_tensors(weight).items()}
            for name, part in read.items():
                i, entry = places[name]
                _write_at(files[i], data_begins[i] + entry.begin, part)
            done += tensor.num_bytes
            if progress is not None:
                progress(done, total)
        if len(files) > 1:
            _write_index(hidden / INDEX, shards, files)
        for file in files:
            _sync(file)
        _copy_others(folder, hidden)
        values: dict[str, Any] = read_json(folder / CONFIG)
        values["quantization_config"] = written_config(scheme, FAMILIES[config.architecture].names)
        (hidden / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        _sync(hidden / CONFIG)
    return Written(sum(shard.num_bytes for shard in shards), len(shards))


def _plan(
    stored: list[StoredTensor],
    quantized: Any,
    shapes_of: Callable[[tuple[int, int]], dict[str, tuple[str, tuple[int, ...]]]],
    shard_bytes: int,
) -> tuple[list[_Shard], dict[str, tuple[int, _Entry]]]:
    """Return the files, and name of a tensor -> its file and place. What belongs to a weight is in one file."""
    shards = [_Shard()]
    for tensor in stored:
        if tensor.name in quantized:
            module = tensor.name.removesuffix(SUFFIX)
            parts = shapes_of((tensor.shape[0], tensor.shape[1]))
            entries = [_Entry(f"{module}.{suffix}", dtype, shape) for suffix, (dtype, shape) in parts.items()]
        else:
            entries = [_Entry(tensor.name, tensor.dtype, tensor.shape)]
        size = sum(entry.num_bytes for entry in entries)
        if shards[-1].entries and shards[-1].num_bytes + size > shard_bytes:
            shards.append(_Shard())
        shards[-1].entries += entries
    for shard in shards:
        # Wide numbers come first, so that each tensor begins at a multiple of its numbers' size.
        ordered = sorted(shard.entries, key=lambda entry: -ITEM_SIZE[entry.dtype])
        begins = accumulate((entry.num_bytes for entry in ordered), initial=0)
        shard.entries = [
            _Entry(entry.name, entry.dtype, entry.shape, begin) for entry, begin in zip(ordered, begins, strict=False)
        ]
    return shards, {entry.name: (i, entry) for i, shard in enumerate(shards) for entry in shard.entries}


@contextmanager
def _complete_or_hidden(out: Path, needed: int) -> Iterator[Path]:
    """Yield a hidden folder beside `out`, and give it the name when the block ends without an error."""
    if os.path.lexists(out):
        raise OutputError(f"{out} exists already; name a folder that does not, or remove it.")
    hidden = out.with_name(f".{out.name}.partial")
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        lock = os.open(hidden, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in hidden.iterdir():  # by a run that was killed
                left.unlink()
            if needed > (free := shutil.disk_usage(hidden).free):
                raise NodeError(f"{out} needs {needed / 2**30:,.1f} GiB, its disk has {free / 2**30:,.1f} free.")
            try:
                yield hidden
            except BaseException:
                shutil.rmtree(hidden, ignore_errors=True)
                raise
            if os.path.lexists(out):
                raise OutputError(f"{out} was made meanwhile; the quantized checkpoint is in {hidden}.")
            os.rename(hidden, out)
            _sync(out.parent)
        finally:
            os.close(lock)
    except BlockingIOError:
        raise OutputError(f"{hidden} is being written by another process, which quantizes to {out} too.") from None
    except OSError as error:
        raise NodeError(f"{out} cannot be written: {error.strerror}.") from None


def _file_name(i: int, num_files: int) -> str:
    return "model.safetensors" if num_files == 1 else f"model-{i + 1:05}-of-{num_files:05}.safetensors"


def _write_header(file: Path, shard: _Shard) -> int:
    """Write a file's header and give the file its size; return where its data begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for entry in shard.entries:
        offsets = [entry.begin, entry.begin + entry.num_bytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + shard.num_bytes)
    return 8 + len(text)


def _write_at(file: Path, offset: int, tensor: Tensor) -> None:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    with open(file, "r+b", buffering=0) as stream:
        stream.seek(offset)
        while data:
            data = data[stream.write(data) :]


def _write_index(path: Path, shards: list[_Shard], files: list[Path]) -> None:
    names = {entry.name: file.name for shard, file in zip(shards, files, strict=True) for entry in shard.entries}
    index = {
        "metadata": {"total_size": sum(shard.num_bytes for shard in shards)},
        "weight_map": dict(sorted(names.items())),
    }
    path.write_text(json.dumps(index, indent=2) + "\n")


def _copy_others(folder: Path, out: Path) -> None:
    """Copy the tokenizer and what else is beside the weights; no weights in other formats, and no folders."""
    for file in sorted(folder.iterdir()):
        is_weights = file.suffix in OTHER_FORMATS or file.name.endswith(".index.json")
        if file.is_file() and not is_weights and not file.name.startswith(".") and file.name != CONFIG:
            shutil.copyfile(file, out / file.name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
