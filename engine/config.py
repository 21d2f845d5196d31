"""EngineConfig (how to run a model) and ModelConfig (what the model is). No torch: a spec check reads these."""

from dataclasses import dataclass

DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs a model. None = chosen from the model and the machine, and logged.

    device:                  "auto" (a CUDA device where there is one), "cpu" or "cuda"
    dtype:                   one of DTYPES; auto = as config.json says
    max_model_len:           longest prompt + completion, in tokens; None = the model's max_position_embeddings
    longrope:                "dynamic" (a sequence's own length decides, as the reference) or "static" (long factors
                             for all where max_model_len exceeds the original length)
    max_num_seqs:            most sequences in one step
    max_num_batched_tokens:  most tokens in one step
    max_num_bulk_tokens:     most tokens that one step computes of the prompts of requests below the highest priority
    kv_cache_memory:         bytes
    deterministic:           rows independent of the batch around them, bit by bit; as yet they always are
    async_scheduling:        schedule and launch a step while the one before still runs; None = on a GPU
    cuda_graphs:             replay decode steps as CUDA graphs, where there is a GPU
    num_threads:             torch's CPU threads; None = leave torch's own
    """

    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    longrope: str = "dynamic"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_bulk_tokens: int | None = None
    kv_cache_memory: int | None = None
    deterministic: bool | None = None
    async_scheduling: bool | None = None
    cuda_graphs: bool = True
    num_threads: int | None = None


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. The factor lists and mscales are LongRoPE's; empty and 1.0 = plain rope.

    rotary_dim:     leading dims of a head that rotate (half layout: pairs i, i + rotary_dim/2)
    mscale:         multiplies cos and sin
    original_max_position_embeddings:  longest sequence that uses the short factors
    """

    theta: float
    rotary_dim: int
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    short_mscale: float = 1.0
    long_mscale: float = 1.0
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape and arithmetic, read from config.json in either spelling (as published, as transformers 5 saves).

    architecture:   "phimoe" | "phi-msft" | "mixtral", the model_type
    head_dim:       from config.json when present, else hidden_size / num_heads
    sliding_window: keys a query sees, itself included; None = all
    router_jitter:  sparsemixer's eps (phimoe)
    dtype:          as config.json says
    eos_token_ids:  union of config.json's and generation_config.json's; generation_eos_token_ids: the latter's alone
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeConfig
    dtype: str
    attention_bias: bool = False
    lm_head_bias: bool = False
    sliding_window: int | None = None
    router_jitter: float = 0.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    generation_eos_token_ids: tuple[int, ...] = ()
