"""Family: how one model family spells its config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moray.engine.config import ModelConfig
from moray.engine.json_options import JsonOptions
from moray.engine.quantization.matrix_names import MatrixNames


@dataclass(frozen=True)
class Stack:
    """Says which stored tensors hold something of every expert of a layer, and what an expert's own are called.

    pattern:      their published names
    names:        of an expert's tensors, with {} for its number and groups of the pattern. If there are several, their
                  rows take turns in what is stored of the expert
    are_columns:  a matrix of an expert is stored as x W multiplies it, [inputs, outputs]
    """

    pattern: str
    names: tuple[str, ...]
    are_columns: bool = False


@dataclass(frozen=True)
class Family:
    """Reads the config of one model family.

    read:      returns the config, from the options of config.json and the fields that all families share; what the
               family does not support it refuses in the options
    names:     the published names of its embedding, routers and head
    other_names:  part of a name between dots, as transformers 5 calls its modules -> the published one. Programs for
                  quantization store tensors under either.
    reads:     options that no other family supports (model_config.OFF), and that `read` reads
    has_window:  sliding_window applies to every layer; False: it is not read
    dtype:     of the weights, where no key of the config names it; None = a key must
    stacks:    stored tensors that hold something of every expert; they are read as if each expert's were stored alone
    spelling:  our name of a key (Mixtral's) -> the name in the file, where they differ
    """

    read: Callable[[JsonOptions, dict[str, Any]], ModelConfig]
    names: MatrixNames
    spelling: Mapping[str, str] = field(default_factory=dict)
    other_names: Mapping[str, str] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    has_window: bool = True
    dtype: str | None = None
    stacks: tuple[Stack, ...] = ()
