"""EngineConfig (how to run a model) and ModelConfig (what the model is). No torch: checks of a job spec use them."""

from dataclasses import dataclass
from typing import Literal, get_args

from moray.engine.float_dtypes import FloatDtype
from moray.engine.quantization.kv_cache import KvCacheDtype, KvCacheScheme, Published
from moray.engine.quantization.scheme import OnLoadKind, Scheme

Dtype = Literal["auto", FloatDtype]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
# Which special tokens are part of generated texts: none, all, or those whose names are part of these texts.
KeptTokens = Literal["drop", "keep"] | tuple[str, ...]


@dataclass(frozen=True)
class EngineConfig:
    """States how the engine runs a model. None means: chosen from the model and the machine, and logged.

    device:                  "auto" (a CUDA device if there is one), "cpu" or "cuda"
    dtype:                   one of DTYPES; "auto" is the dtype of config.json
    quantization:            what the weights of experts and attention are quantized to while they are loaded; None =
                             they stay as the checkpoint has them
    max_model_len:           longest prompt + completion, in tokens; None = the model's max_position_embeddings
    longrope:                "dynamic" (each sequence's own length decides, as in the reference) or "static" (the long
                             factors for all sequences if max_model_len exceeds the original length)
    max_num_seqs:            maximum sequences in one step
    max_num_batched_tokens:  maximum tokens in one step
    mean_cached_tokens:      tokens of a running sequence in the KV cache, on average, where the caller knows it; the
                             limits are chosen with it
    max_num_bulk_tokens:     maximum prompt tokens in one step of requests below the highest priority
    is_bulk:                 nobody waits for any first token, as in a batch job: prompts may wait for each other
    kv_cache_memory:         size of the KV cache in bytes, of all ranks together
    kv_cache_dtype:          what keys and values are stored in: "model" (the model's dtype) or "fp8" (e4m3, with the
                             scales of the checkpoint or calibrated ones); None = fp8 if the checkpoint says so and has
                             the scales
    async_scheduling:        schedule and launch a step while the previous one still runs; None = only on a GPU
    cuda_graphs:             replay steps as graphs: CUDA graphs, or on the CPU graphs of compiled calls
    num_threads:             torch's CPU threads, of all ranks together; None = torch's own choice
    tensor_parallel:         ranks among which the model is split, one of partition.SIZES, on as many GPUs; None = 1
    expert_parallel:         each rank has some experts whole, not a part of every expert
    special_tokens:          which special tokens are part of generated texts, where stop strings are looked for
    """

    device: str = "auto"
    dtype: str = "auto"
    quantization: OnLoadKind | None = None
    max_model_len: int | None = None
    longrope: str = "dynamic"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_bulk_tokens: int | None = None
    mean_cached_tokens: int | None = None
    is_bulk: bool = False
    kv_cache_memory: int | None = None
    kv_cache_dtype: KvCacheDtype | None = None
    async_scheduling: bool | None = None
    cuda_graphs: bool = True
    num_threads: int | None = None
    tensor_parallel: int | None = None
    expert_parallel: bool = False
    special_tokens: KeptTokens = "drop"


@dataclass(frozen=True)
class RopeConfig:
    """Describes the rotary embedding of a model: plain rope, YaRN, or LongRoPE with factors and mscales.

    theta:                      base of the frequencies
    rotary_dim:                 leading dims of a head that rotate (half layout: pairs i, i + rotary_dim/2)
    short_factor, long_factor:  what wavelengths are multiplied with, rotary_dim/2 of each; empty for plain rope. YaRN
                                has the short ones alone
    short_mscale, long_mscale:  multiply cos and sin; 1.0 for plain rope
    original_max_position_embeddings:  longest sequence that uses the short factors; None = all sequences do
    max_position_embeddings:    longest sequence for which YaRN's factors are made; None without YaRN
    """

    theta: float
    rotary_dim: int
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    short_mscale: float = 1.0
    long_mscale: float = 1.0
    original_max_position_embeddings: int | None = None
    max_position_embeddings: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Describes a model's shape and arithmetic, from a config.json as published or as transformers 5 saves it.

    architecture:   the model_type, such as "phimoe"
    intermediate_size:  of an expert
    head_dim:       from config.json if present, else hidden_size / num_heads
    sliding_window: number of keys that a query attends to, its own included; None = all
    full_layers:    layers in which a query attends to all keys although there is a sliding window
    attention_bias: q, k and v have biases; whether the output projection has one too is the family's matter
    clip_qkv:       q, k and v are limited to -clip_qkv .. clip_qkv before rope; None = they are not
    router_jitter:  sparsemixer's eps (phimoe)
    norm_topk_prob: the weights of a token's experts are divided by their sum, as a softmax over the chosen ones gives
    dense_layers:   layers that have one MLP in place of experts, of dense_intermediate_size
    swiglu_limit:   what the experts' clamped SwiGLU is limited to; 0 = they have another activation
    shared_intermediate_size:  of the expert that every token goes through besides those it chooses; 0 = there is none
    norm_rounds_last:  an RMSNorm rounds a row to the model's dtype after its weight multiplies it, not before
    embedding_multiplier, residual_multiplier:  factors of the embeddings, and of what each block adds to the residual
    attention_multiplier:  factor of q k^T; None = head_dim ** -0.5
    logits_scaling:  what the logits are divided by
    tie_word_embeddings:  the embeddings are the weight of the head too
    max_position_embeddings:  longest sequence: as config.json has it, or as YaRN stretches it, whichever is more
    dtype:          the dtype that config.json names
    eos_token_ids:  union of those in config.json and generation_config.json
    generation_eos_token_ids:  those in generation_config.json alone
    quantization:   how the weights of linear layers are quantized, in the checkpoint or on load; None if not
    published_kv_cache: what the checkpoint's config says of the KV cache; None = nothing
    kv_cache:       how keys and values are quantized in the KV cache; None: they have the dtype that the model runs in
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
    full_layers: tuple[int, ...] = ()
    clip_qkv: float | None = None
    router_jitter: float = 0.0
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()
    dense_intermediate_size: int = 0
    swiglu_limit: float = 0.0
    shared_intermediate_size: int = 0
    norm_rounds_last: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    generation_eos_token_ids: tuple[int, ...] = ()
    quantization: Scheme | None = None
    published_kv_cache: Published | None = None
    kv_cache: KvCacheScheme | None = None
