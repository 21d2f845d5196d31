"""Family: how one model family spells its config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moray.engine.config import ModelConfig
from moray.engine.json_options import JsonOptions
from moray.engine.quantization.matrix_names import MatrixNames


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
    stacks:    pattern of the published names of tensors that hold a matrix of each expert; they are read as if expert
               E's had E as a part of its name of its own, before its last part
    spelling:  our name of a key (Mixtral's) -> the name in the file, where they differ
    """

    read: Callable[[JsonOptions, dict[str, Any]], ModelConfig]
    names: MatrixNames
    spelling: Mapping[str, str] = field(default_factory=dict)
    other_names: Mapping[str, str] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    has_window: bool = True
    stacks: str | None = None
