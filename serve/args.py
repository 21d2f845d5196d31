"""EndpointArgs: what `serve.app:build` takes, from a Serve config or from `moray serve`."""

from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from engine.config import EngineConfig


class EndpointArgs(BaseModel):
    """How to run an endpoint. Limits hold for each replica.

    model:     folder, s3://, gs:// or hf://org/name; name: the id that clients ask for, the folder's by default
    device to num_threads:  of the engine, as in EngineConfig; kv_cache_memory in bytes

    keys_file: bearer keys, one a line, read again when it changes; the keys in MORAY_API_KEYS (separated by commas) are
               valid too. Without any, only clients on this machine are served, unless is_public
    max_waiting:        samples that may wait for a place in the engine; beyond them: 429
    max_tokens_cap:     most tokens that a request may ask for; None = what the context holds
    max_body_bytes, request_timeout_s:  of a request
    max_concurrent_per_key, max_requests_per_minute_per_key:  None = no limit

    min_replicas, max_replicas:  copies of the model: as many as keep the tokens that are still to compute or to
                                 generate at queued_tokens_per_replica each
    upscale_delay_s, downscale_delay_s:  how long more, or fewer, must be wanted
    num_cpus, num_gpus:          tickets that Ray sets aside for a replica
    drain_timeout_s:             for what runs when a replica is stopped
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    name: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    max_model_len: PositiveInt | None = None
    max_num_seqs: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    max_num_bulk_tokens: PositiveInt | None = None
    kv_cache_memory: PositiveInt | None = None
    num_threads: PositiveInt | None = None

    keys_file: str | None = None
    is_public: bool = False
    max_waiting: int = Field(256, ge=0)
    max_tokens_cap: PositiveInt | None = None
    max_body_bytes: PositiveInt = 8 << 20
    request_timeout_s: PositiveFloat = 600.0
    max_concurrent_per_key: PositiveInt | None = None
    max_requests_per_minute_per_key: PositiveInt | None = None

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    queued_tokens_per_replica: PositiveInt = 100_000
    upscale_delay_s: float = Field(10.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)
    num_cpus: float = Field(0.5, ge=0)
    num_gpus: float = Field(0, ge=0)
    drain_timeout_s: PositiveFloat = 60.0

    @property
    def model_name(self) -> str:
        return self.name or PurePosixPath(self.model.rstrip("/")).name

    def engine_config(self, num_threads: int) -> EngineConfig:
        """`num_threads`: where the args leave it open."""
        return EngineConfig(
            device=self.device,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_bulk_tokens=self.max_num_bulk_tokens,
            kv_cache_memory=self.kv_cache_memory,
            num_threads=self.num_threads or num_threads,
        )
