"""What a model is and takes, read from its config and the headers of its weight files: kilobytes, wherever it lies."""

import math
from dataclasses import dataclass
from typing import Any

from engine.checkpoint.json_file import parse_json
from engine.checkpoint.model_config import parse_model_config
from engine.config import ModelConfig
from engine.limits import cache_bytes_per_token
from engine.remote import ModelFolder

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ModelFacts:
    """
    dtype:              that it runs in
    weights_bytes:      in memory, in that dtype
    cache_token_bytes:  KV cache of one token
    """

    architecture: str
    num_parameters: int
    num_experts: int
    num_experts_per_tok: int
    dtype: str
    weights_bytes: int
    cache_token_bytes: int
    max_position_embeddings: int


def read_facts(folder: ModelFolder, config: ModelConfig, dtype: str) -> ModelFacts:
    """`dtype` is the spec's. Raises CheckpointError where the folder holds no weights that we run."""
    dtype = config.dtype if dtype == "auto" else dtype
    num_parameters = sum(_count_parameters(folder, name) for name in folder.weight_files())
    return ModelFacts(
        architecture=config.architecture,
        num_parameters=num_parameters,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        dtype=dtype,
        weights_bytes=num_parameters * ITEM_BYTES[dtype],
        cache_token_bytes=cache_bytes_per_token(config, ITEM_BYTES[dtype]),
        max_position_embeddings=config.max_position_embeddings,
    )


def read_chat_template(folder: ModelFolder) -> tuple[str, str] | None:
    """The checkpoint's own chat template, as transformers finds it, behind the name of the file that it stands in."""
    files = folder.files()
    if (name := "chat_template.jinja") in files:
        return name, folder.read(name, 0, files[name]).decode(errors="replace")
    if (name := "tokenizer_config.json") not in files:
        return None
    template = _read_json(folder, name).get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = [one for one in template if isinstance(one, dict)]
        template = next((one.get("template") for one in named if one.get("name") == "default"), None)
    return (name, template) if isinstance(template, str) else None


def read_config(folder: ModelFolder) -> ModelConfig:
    """Raises CheckpointError where the folder holds no model that we run."""
    generation = "generation_config.json"
    has_generation = generation in folder.files()
    return parse_model_config(
        _read_json(folder, "config.json"), _read_json(folder, generation) if has_generation else {}, folder.path
    )


def _read_json(folder: ModelFolder, name: str) -> dict[str, Any]:
    return parse_json(folder.read(name, 0, folder.files()[name]), f"{folder.path}/{name}")


def _count_parameters(folder: ModelFolder, name: str) -> int:
    length = int.from_bytes(folder.read(name, 0, 8), "little")
    header = parse_json(folder.read(name, 8, length), f"{folder.path}/{name} (header)")
    return sum(math.prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__")
