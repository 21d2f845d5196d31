"""Features that the engine may have: each is checked and measured as soon as its key is there."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from moray.engine.config import EngineConfig

# name in the results -> settings of EngineConfig
FEATURES: Mapping[str, Mapping[str, Any]] = {"fp8 KV cache": {"kv_cache_dtype": "fp8"}}


def available_features() -> dict[str, Mapping[str, Any]]:
    """Return the features whose settings this engine has."""
    known = {field.name for field in fields(EngineConfig)}
    return {name: settings for name, settings in FEATURES.items() if known >= settings.keys()}
