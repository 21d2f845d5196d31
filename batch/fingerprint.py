"""The fingerprint of a job: everything its answers depend on, by name.

Two runs may share an output folder where their fingerprints agree.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moray.batch.spec import JobSpec

Value = Any  # JSON: str, numbers, bool, None, lists, mappings with text keys


@dataclass(frozen=True)
class Fingerprint:
    """Everything that a job's answers depend on.

    files:   path relative to the input root -> what identifies the file
    others:  the other components, dotted name -> value
    """

    files: Mapping[str, str]
    others: Mapping[str, Value]

    @cached_property
    def hexdigest(self) -> str:
        """Return the SHA-256 of the canonical JSON of all components."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def short(self) -> str:
        """Return the first eight digits, which are part of the names of parts."""
        return self.hexdigest[:8]

    @property
    def is_structured(self) -> bool:
        """Return whether texts obey a schema or a grammar, at least in some rows."""
        columns = self.others.get("sampling.columns") or {}
        is_named = any(name.startswith("structured.") for name in columns)
        return self.others.get("task") == "generate" and ("sampling.structured" in self.others or is_named)

    def differences(self, new: "Fingerprint") -> Iterator[str]:
        """Yield what changed from this fingerprint to `new`, one line per change; nothing where they agree."""
        for name in sorted(self.others.keys() | new.others.keys()):
            before, after = self.others.get(name), new.others.get(name)
            if before != after:
                yield f"{name}: {_show(before)} -> {_show(after)}"
        for path in sorted(self.files.keys() | new.files.keys()):
            if path not in new.files:
                yield f"input file {path}: missing now"
            elif path not in self.files:
                yield f"new input file {path}"
            elif self.files[path] != new.files[path]:
                yield f"input file {path}: {_show(self.files[path])} -> {_show(new.files[path])}"

    def to_json(self) -> dict[str, Any]:
        return {"files": dict(self.files), "others": dict(self.others)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fingerprint":
        return cls(files=value["files"], others=value["others"])


def compute_fingerprint(
    spec: JobSpec,
    files: Mapping[str, str],
    model: Mapping[str, str],
    quantization: str | None = None,
    kv_cache: str | None = None,
    hive_keys: Sequence[str] = (),
) -> Fingerprint:
    """Compute the fingerprint of a job.

    files:         path relative to the input root -> what identifies the file (size, SHA-256 of the footer)
    model:         name (weights, tokenizer, config) -> digest
    hive_keys:     the columns from the names of folders that the job reads
    quantization:  the format of quantized weights with its version, such as int8/1; None = they are not quantized
    kv_cache:      the format of a quantized KV cache with its version, such as fp8/1; None = it is not quantized
    """
    parts = spec.model_dump(mode="json")
    others: dict[str, Value] = {"task": parts["task"]}
    others |= {f"model.{name}": digest for name, digest in model.items()}
    others |= {f"model.{name}": parts["model"][name] for name in ("dtype", "max_model_len", "longrope")}
    for section in ("template", "sampling"):
        others |= {f"{section}.{name}": value for name, value in parts.get(section, {}).items()}
    others |= {f"input.{name}": parts["input"][name] for name in ("prompt", "messages", "token_ids")}
    if spec.template.date == "today":  # no prompt uses the date, or it is not settled yet
        del others["template.date"]
    # defaults are left out, as in fingerprints from before these keys existed
    for name, default in (("special_tokens", "allow"), ("bos", "auto"), ("variables", {}), ("columns", {})):
        if others[f"template.{name}"] == default:
            del others[f"template.{name}"]
    if others.get("sampling.structured") is None:
        others.pop("sampling.structured", None)
    if quantization is not None:  # fingerprints from before there were such weights have no such component
        others["model.quantization"] = quantization
    if kv_cache is not None:
        others["engine.kv_cache_dtype"] = kv_cache
    for name in ("where", "sample", "limit"):
        if parts["input"][name] is not None:
            others[f"input.{name}"] = parts["input"][name]
    if parts["input"]["sample"] is not None:
        others["input.sample_seed"] = parts["input"]["sample_seed"]
    if parts["input"]["messages_format"] != "auto":
        others["input.messages_format"] = parts["input"]["messages_format"]
    if hive_keys:
        others["input.hive"] = list(hive_keys)
    if spec.task == "score":
        others["input.continuation"] = parts["input"]["continuation"]
    others |= {f"output.{name}": parts["output"][name] for name in ("keep", "token_ids", "logprobs")}
    others |= {
        f"output.{name}": parts["output"][name]
        for name, default in (("special_tokens", "drop"), ("reasoning", None), ("parse", False))
        if parts["output"][name] != default
    }
    others["engine.deterministic"] = "auto"  # a key that is gone, with the value that almost all fingerprints have
    return Fingerprint(files=dict(files), others=others)


def _show(value: Value) -> str:
    """Format a value; digests in it are cut to their first 12 digits."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", text)
