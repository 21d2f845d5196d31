"""EndpointArgs: the arguments of `moray.serve.app:build`, which a Serve config or `moray serve` gives."""

import os
import re
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

from moray.engine.config import Dtype, EngineConfig
from moray.engine.partition import find_gpu_mistake
from moray.engine.quantization.kv_cache import KvCacheDtype
from moray.engine.settings import types as t
from moray.engine.settings.markers import Markers, find_markers
from moray.engine.text.tool_calls import CALL_MARKERS


def _is_origin(value: str) -> bool:
    return value == "*" or _ORIGIN.fullmatch(value) is not None


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")
Origin = Annotated[
    str, t.expect(_is_origin), t.must("* or an origin such as https://chat.example.org:8443, without a path")
]
_null_is_auto = BeforeValidator(lambda value: "auto" if value is None else value)
AutoCount = Annotated[t.AutoCount, _null_is_auto]
AutoSize = Annotated[t.AutoSize, _null_is_auto]
KvDtype = Annotated[t.AutoKvCacheDtype, _null_is_auto]
NumRanks = Annotated[t.NumRanks, _null_is_auto]
MaybeSize = Annotated[t.Size | None, t.must("null, bytes or a size such as 500GiB, more than 0")]
# Absolute, since each of Ray's processes has a current directory of its own.
_make_absolute = AfterValidator(lambda path: path if "://" in path else os.path.abspath(os.path.expanduser(path)))
BatchStore = Annotated[
    Annotated[t.Text, _make_absolute] | None, t.must("null, or a folder, s3:// or gs:// address of its own")
]


class EndpointArgs(BaseModel):
    """Describes how to run an endpoint. Limits hold for each replica.

    model:     folder, s3://, gs:// or hf://org/name
    name:      the model id that clients send; by default the name of the model's folder
    device to num_threads:  arguments of EngineConfig; auto = the engine chooses. Sizes are bytes, or text such as 2GiB

    keys_file: file of bearer keys, one a line, read again when it changes; the keys in MORAY_API_KEYS (separated by
               commas) are valid too. Without any, only clients on this machine are served, unless is_public
    is_public: serve other machines even without keys
    cors_origins:       web pages that may use the endpoint from a browser, such as https://chat.example.org; * = all
    max_waiting:        samples that may wait for a slot in the engine; a request beyond them is answered with 429
    max_tokens_cap:     most tokens that a request may ask for; None = what the context holds
    reasoning:          what is around the reasoning in answers of chats, to be a field of its own; None = no split
    max_body_bytes:     largest body of a request
    request_timeout_s:  longest time that a request may run, in seconds
    max_concurrent_per_key, max_requests_per_minute_per_key:  None = no limit

    batch_store:        folder, s3:// or gs:// for the files and batches of the Batch API; None = it is not offered
    max_batch_requests, max_file_bytes:  largest batch, and largest file
    max_store_bytes:    size of the store from which on no more files are accepted; None = no limit
    file_retention_days, batch_retention_days:  how long a file is kept, and a batch after its end

    min_replicas, max_replicas:  bounds on the copies of the model: Serve keeps the tokens that are still to compute or
                                 to generate at queued_tokens_per_replica each
    upscale_delay_s, downscale_delay_s:  seconds for which more, or fewer, replicas must be needed before they change
    num_cpus, num_gpus:          logical resources that Ray reserves for a replica; each rank has a GPU of its own
    drain_timeout_s:             seconds that running requests have when a replica is stopped
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    name: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Dtype = "auto"
    quantization: t.Quantization = None
    max_model_len: t.MaybeCount = None
    max_num_seqs: AutoCount = "auto"
    max_num_batched_tokens: AutoCount = "auto"
    max_num_bulk_tokens: AutoCount = "auto"
    kv_cache_memory: AutoSize = "auto"
    kv_cache_dtype: KvDtype = "auto"
    tensor_parallel: NumRanks = "auto"
    expert_parallel: bool = False
    num_threads: AutoCount = "auto"

    keys_file: str | None = None
    is_public: bool = False
    cors_origins: list[Origin] = []
    max_waiting: t.Whole = 256
    max_tokens_cap: t.MaybeCount = None
    reasoning: t.Reasoning = None
    max_body_bytes: t.Size = 8 << 20
    request_timeout_s: t.Seconds = 600.0
    max_concurrent_per_key: t.MaybeCount = None
    max_requests_per_minute_per_key: t.MaybeCount = None

    batch_store: BatchStore = None
    max_batch_requests: t.Count = 50_000
    max_file_bytes: t.Size = 200 << 20
    max_store_bytes: MaybeSize = None
    file_retention_days: t.Seconds = 30.0
    batch_retention_days: t.Seconds = 90.0

    min_replicas: t.Count = 1
    max_replicas: t.Count = 1
    queued_tokens_per_replica: t.Count = 100_000
    upscale_delay_s: t.Amount = 10.0
    downscale_delay_s: t.Amount = 300.0
    num_cpus: t.Amount = 0.5
    num_gpus: t.Gpus = 0
    drain_timeout_s: t.Seconds = 60.0

    @field_validator("num_gpus")
    @classmethod
    def _check_ranks(cls, value: float, info: ValidationInfo) -> float:
        if (mistake := find_gpu_mistake(value, info.data.get("tensor_parallel", "auto"))) is not None:
            raise t.wrong(f"is {value:g}, but {mistake}")
        return value

    @property
    def model_name(self) -> str:
        return self.name or PurePosixPath(self.model.rstrip("/")).name

    @property
    def markers(self) -> Markers | None:
        """Return what is around the reasoning; None where it is not split off."""
        return find_markers(self.reasoning)

    @property
    def chosen_kv_cache_dtype(self) -> KvCacheDtype | None:
        """Return what keys and values are stored in; None = what the checkpoint says."""
        return None if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    @property
    def num_ranks(self) -> int:
        """Return the ranks of a replica: those that are set, or one for each of its GPUs."""
        return _chosen(self.tensor_parallel) or max(1, int(self.num_gpus))

    def engine_config(self, num_threads: int) -> EngineConfig:
        """Make the engine's config. A replica that reserves a GPU never computes on the CPU.

        num_threads:  value for args that leave it at auto
        """
        return EngineConfig(
            device="cuda" if self.device == "auto" and self.num_gpus > 0 else self.device,
            dtype=self.dtype,
            quantization=self.quantization,
            max_model_len=self.max_model_len,
            max_num_seqs=_chosen(self.max_num_seqs),
            max_num_batched_tokens=_chosen(self.max_num_batched_tokens),
            max_num_bulk_tokens=_chosen(self.max_num_bulk_tokens),
            kv_cache_memory=_chosen(self.kv_cache_memory),
            kv_cache_dtype=self.chosen_kv_cache_dtype,
            tensor_parallel=self.num_ranks,
            expert_parallel=self.expert_parallel,
            num_threads=_chosen(self.num_threads) or num_threads,
            special_tokens=(*CALL_MARKERS, *(() if self.markers is None else self.markers.texts)),
        )


def _chosen(value: int | t.Auto) -> int | None:
    return None if value == "auto" else value
