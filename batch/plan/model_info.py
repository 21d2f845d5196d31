"""Read a model's size and shape from its config and the headers of its weight files: a few kilobytes, also from an
object store."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moray.engine.checkpoint.expert_stacks import split_stacks
from moray.engine.checkpoint.json_file import parse_json
from moray.engine.checkpoint.kv_cache import with_kv_cache
from moray.engine.checkpoint.model_config import parse_model_config
from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.checkpoint.stored_weights import check_quantized
from moray.engine.checkpoint.weight_sizes import measure_weights
from moray.engine.config import ModelConfig
from moray.engine.core.limits import cache_bytes_per_token
from moray.engine.errors import CheckpointError
from moray.engine.float_dtypes import ITEM_BYTES
from moray.engine.quantization.kv_cache import KvCacheDtype
from moray.engine.quantization.scheme import ON_LOAD_KINDS, OnLoadKind
from moray.engine.text.chat_template import find_default_mistake


@dataclass(frozen=True)
class ModelInfo:
    """Describes a model as a job runs it.

    dtype:              data type that it runs in
    quantization:       format of the weights of experts and attention with its version, such as int8/1; None: dtype
    weights_bytes:      memory of the weights in these types
    cache_token_bytes:  KV cache of one token, over all layers

    quantized_weights_bytes:  what model.quantization may be -> memory of the weights then; {} where they are quantized
    kv_cache:                 format of keys and values with its version, such as fp8/1; None: dtype
    rank_weights_bytes:       number of ranks that the model can be split among -> memory of one rank's weights
    quantized_rank_weights_bytes:  the same for each value that model.quantization may have
    """

    architecture: str
    num_parameters: int
    num_experts: int
    num_experts_per_tok: int
    dtype: str
    weights_bytes: int
    cache_token_bytes: int
    max_position_embeddings: int
    quantization: str | None = None
    kv_cache: str | None = None
    quantized_weights_bytes: Mapping[str, int] = field(default_factory=dict)
    rank_weights_bytes: Mapping[int, int] = field(default_factory=dict)
    quantized_rank_weights_bytes: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    def weights_of_rank(self, ranks: int, kind: str | None = None) -> int | None:
        """Return the memory of one rank's weights; None where the model cannot be split among so many ranks, or
        quantized to this kind on load.

        kind: a value of model.quantization in place of the present one; None = the present one
        """
        if ranks == 1:
            return self.weights_bytes if kind is None else self.quantized_weights_bytes.get(kind)
        sizes = self.rank_weights_bytes if kind is None else self.quantized_rank_weights_bytes.get(kind, {})
        return sizes.get(ranks)

    @property
    def types(self) -> str:
        """Return what its weights are, for a person: "bfloat16", or "int8/1 and bfloat16"."""
        return self.dtype if self.quantization is None else f"{self.quantization} and {self.dtype}"


def read_model_info(folder: ModelSource, config: ModelConfig, dtype: str) -> ModelInfo:
    """Read a model's description from the headers of its weight files.

    dtype: model.dtype of the spec; auto = the checkpoint's

    Raises CheckpointError where the folder has no weights that moray runs, a weight file is cut short, or quantized
    weights are not stored as the config says.
    """
    dtype = config.dtype if dtype == "auto" else dtype
    tensors = split_stacks(folder.tensors(), config.architecture)
    check_quantized(tensors, config, folder.path)
    sizes = measure_weights(tensors, config, ITEM_BYTES[dtype])
    quantized = {
        kind: measure_weights(tensors, with_quantization(config, kind, folder.path), ITEM_BYTES[dtype])
        for kind in (ON_LOAD_KINDS if config.quantization is None else ())
    }
    return ModelInfo(
        architecture=config.architecture,
        num_parameters=sizes.num_parameters,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        dtype=dtype,
        weights_bytes=sizes.num_bytes,
        cache_token_bytes=cache_bytes_per_token(config, ITEM_BYTES[dtype]),
        max_position_embeddings=config.max_position_embeddings,
        quantization=None if config.quantization is None else config.quantization.label,
        kv_cache=None if config.kv_cache is None else config.kv_cache.label,
        quantized_weights_bytes={kind: sizes.num_bytes for kind, sizes in quantized.items()},
        rank_weights_bytes=sizes.rank_bytes,
        quantized_rank_weights_bytes={kind: sizes.rank_bytes for kind, sizes in quantized.items()},
    )


def read_chat_template(folder: ModelSource) -> tuple[str, str] | None:
    """Return the file name and text of the checkpoint's own chat template, found as transformers finds it; None where
    there is none.

    Raises CheckpointError where there are several templates and none is the default.
    """
    files = folder.files()
    if (name := "chat_template.jinja") in files:
        return name, folder.read(name, 0, files[name]).decode(errors="replace")
    if (name := "tokenizer_config.json") not in files:
        return None
    template = _read_json(folder, name).get("chat_template")
    if isinstance(template, list):  # several templates, each with a name
        named = {str(one.get("name")): one.get("template") for one in template if isinstance(one, dict)}
        if (mistake := find_default_mistake(named)) is not None:
            raise CheckpointError(f"{folder.path}/{name}: {mistake}, or give template.chat")
        template = named["default"]
    return (name, template) if isinstance(template, str) else None


def read_config(
    folder: ModelSource, quantization: OnLoadKind | None = None, kv_cache_dtype: KvCacheDtype | None = None
) -> ModelConfig:
    """Read the model's config.

    quantization:    what its weights are quantized to while they are loaded; None = they stay as they are stored
    kv_cache_dtype:  what keys and values are stored in; None = what the checkpoint says

    Raises CheckpointError where the folder has no model that moray runs, or one that is quantized already.
    """
    generation = "generation_config.json"
    has_generation = generation in folder.files()
    config = parse_model_config(
        _read_json(folder, "config.json"), _read_json(folder, generation) if has_generation else {}, folder.path
    )
    config = with_quantization(config, quantization, folder.path)
    return with_kv_cache(config, kv_cache_dtype, folder.tensors, folder.path)


def _read_json(folder: ModelSource, name: str) -> dict[str, Any]:
    return parse_json(folder.read(name, 0, folder.files()[name]), f"{folder.path}/{name}")
