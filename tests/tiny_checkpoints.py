"""Small random checkpoints in published form, and transformers models that read the same weights: the references."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SHORT = [1.0, 1.1, 1.2, 1.4, 1.8, 2.0, 2.4, 2.8]
LONG = [1.1, 1.3, 2.0, 4.0, 9.0, 17.0, 33.0, 60.0]

PHIMOE: dict[str, Any] = {
    "architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe", "vocab_size": 160, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 256,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0, "sliding_window": 256, "attention_bias": True,
    "lm_head_bias": True, "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "router_jitter_noise": 0.01, "input_jitter_noise": 0.01, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "torch_dtype": "float32",
    "rope_scaling": {
        "type": "longrope", "short_factor": SHORT, "long_factor": LONG, "short_mscale": 1.243, "long_mscale": 1.4,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 160, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 256, "rope_theta": 1e6,
    "sliding_window": None, "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
PHIXTRAL: dict[str, Any] = {
    "architectures": ["PhiForCausalLM"], "model_type": "phi-msft", "vocab_size": 160, "n_embd": 80, "n_layer": 2,
    "n_head": 4, "n_head_kv": None, "n_inner": None, "rotary_dim": 8, "n_positions": 256,
    "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "num_experts_per_tok": 2, "num_local_experts": 4,
    "tie_word_embeddings": False, "resid_pdrop": 0.1, "torch_dtype": "float32",
}  # fmt: skip
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 160, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 4,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [1], "max_position_embeddings": 256,
    "rope_theta": 1e6, "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0,
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 2, "tie_word_embeddings": False,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
GRANITEMOE: dict[str, Any] = {
    "architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "vocab_size": 163, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "num_local_experts": 8, "num_experts_per_tok": 4, "embedding_multiplier": 3.0, "logits_scaling": 1.5,
    "residual_multiplier": 0.22, "attention_multiplier": 0.0625, "max_position_embeddings": 256, "rope_theta": 1e4,
    "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "torch_dtype": "float32",
}  # fmt: skip
OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 160, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48,
    "num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": False, "clip_qkv": None,
    "max_position_embeddings": 256, "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False,
    "attention_dropout": 0.0, "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "eos_token_id": 2, "pad_token_id": 1, "torch_dtype": "float32",
}  # fmt: skip
QWEN2_MOE: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "vocab_size": 160, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 80,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 96, "num_experts": 6, "num_experts_per_tok": 3,
    "norm_topk_prob": False, "decoder_sparse_step": 1, "max_position_embeddings": 256, "rope_theta": 1e6,
    "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1, "attention_dropout": 0.0,
    "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "float32",
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 160, "hidden_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 4, "experts_per_token": 4,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24, "swiglu_limit": 0.8,
    "max_position_embeddings": 256, "initial_context_length": 32, "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 32,
    },
    "attention_bias": True, "attention_dropout": 0.0, "tie_word_embeddings": False, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "eos_token_id": 2, "pad_token_id": 1, "torch_dtype": "float32",
}  # fmt: skip
TINY = (PHIMOE, MIXTRAL, PHIXTRAL, QWEN3_MOE, GRANITEMOE, OLMOE, QWEN2_MOE, GPT_OSS)
FAMILIES = tuple(config["model_type"] for config in TINY)
# With these, every format and every batch is tested; what the others add to them, with one of each.
FIRST_FAMILIES, LATER_FAMILIES = FAMILIES[:3], FAMILIES[3:]


def write(folder: Path, config: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write config.json in the hub's spelling and model.safetensors with the hub's tensor names.

    Norm weights lie around 1, biases are not 0, gates are large so that routing is spread.
    """
    names = NAMES[config["model_type"]](config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in names.items():
        values = torch.randn(shape, generator=generator)
        is_norm = "norm" in name or ".ln." in name
        if name.endswith("bias"):
            values = values * 0.1
        elif name.endswith("sinks"):
            values = values + 1
        elif is_norm:
            values = 1 + values * 0.1
        elif ".gate." in name or ".router." in name:
            values = values * 6 / shape[-1] ** 0.5
        elif "embed" in name or ".embd." in name:
            values = values * 0.5
        else:
            values = values * 1.5 / shape[-1] ** 0.5
        tensors[name] = values.to(dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    text = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def _llama_names(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, i, v, e = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_local_experts"))
    head_dim = config.get("head_dim") or h // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    biased_norms = config["model_type"] == "phimoe"
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h), "lm_head.weight": (v, h)}
    norms = ["model.norm"]
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        shapes = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
        for name, shape in shapes.items():
            names[f"{layer}.self_attn.{name}.weight"] = shape
            if config.get("attention_bias"):
                names[f"{layer}.self_attn.{name}.bias"] = shape[:1]
        moe = f"{layer}.block_sparse_moe"
        names[f"{moe}.gate.weight"] = (e, h)
        for expert in range(e):
            names |= {f"{moe}.experts.{expert}.w1.weight": (i, h), f"{moe}.experts.{expert}.w3.weight": (i, h)}
            names[f"{moe}.experts.{expert}.w2.weight"] = (h, i)
    for norm in norms:
        names[f"{norm}.weight"] = (h,)
        if biased_norms:
            names[f"{norm}.bias"] = (h,)
    if config.get("lm_head_bias"):
        names["lm_head.bias"] = (v,)
    return names


def _phi_names(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, v, e = config["n_embd"], config["vocab_size"], config["num_local_experts"]
    i = config["n_inner"] or 4 * h
    names: dict[str, tuple[int, ...]] = {"transformer.embd.wte.weight": (v, h)}
    weights = {"lm_head.linear": (v, h), "lm_head.ln": (h,)}
    for n in range(config["n_layer"]):
        layer = f"transformer.h.{n}"
        weights |= {f"{layer}.ln": (h,), f"{layer}.mixer.Wqkv": (3 * h, h), f"{layer}.mixer.out_proj": (h, h)}
        for expert in range(e):
            weights |= {f"{layer}.moe.mlp.{expert}.fc1": (i, h), f"{layer}.moe.mlp.{expert}.fc2": (h, i)}
        names[f"{layer}.moe.gate.weight"] = (e, h)
    for name, shape in weights.items():
        names |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return names


def _sequential_names(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return what Qwen's, OLMoE's, Granite's and OpenAI's models have outside the layers' experts and MLPs."""
    h, v, kind = config["hidden_size"], config["vocab_size"], config["model_type"]
    head_dim = config.get("head_dim") or h // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    if not config["tie_word_embeddings"]:
        names["lm_head.weight"] = (v, h)
    for n in range(config["num_hidden_layers"]):
        layer, attention = f"model.layers.{n}", f"model.layers.{n}.self_attn"
        names |= {f"{layer}.input_layernorm.weight": (h,), f"{layer}.post_attention_layernorm.weight": (h,)}
        for letter, rows in (("q", q), ("k", kv), ("v", kv)):
            names[f"{attention}.{letter}_proj.weight"] = (rows, h)
            if kind == "qwen2_moe" and config.get("qkv_bias", True):
                names[f"{attention}.{letter}_proj.bias"] = (rows,)
        names[f"{attention}.o_proj.weight"] = (h, q)
        if kind in ("qwen3_moe", "olmoe"):
            each = kind == "qwen3_moe"
            names[f"{attention}.q_norm.weight"] = (head_dim if each else q,)
            names[f"{attention}.k_norm.weight"] = (head_dim if each else kv,)
    return names


def _qwen_names(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, experts = config["hidden_size"], config["num_experts"]
    names = _sequential_names(config)

    def mlp(name: str, i: int) -> dict[str, tuple[int, ...]]:
        shapes = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
        return {f"{name}.{part}.weight": shape for part, shape in shapes.items()}

    for n in range(config["num_hidden_layers"]):
        name = f"model.layers.{n}.mlp"
        if n in config.get("mlp_only_layers", []) or (n + 1) % config.get("decoder_sparse_step", 1):
            names |= mlp(name, config["intermediate_size"])
            continue
        names[f"{name}.gate.weight"] = (experts, h)
        for expert in range(experts):
            size = config.get("moe_intermediate_size", config["intermediate_size"])
            names |= mlp(f"{name}.experts.{expert}", size)
        if config["model_type"] == "qwen2_moe":
            names[f"{name}.shared_expert_gate.weight"] = (1, h)
            names |= mlp(f"{name}.shared_expert", config["shared_expert_intermediate_size"])
    return names


def _granite_names(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, i, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    names = _sequential_names(config)
    for n in range(config["num_hidden_layers"]):
        moe = f"model.layers.{n}.block_sparse_moe"
        names[f"{moe}.router.layer.weight"] = (experts, h)
        names |= {f"{moe}.input_linear.weight": (experts, 2 * i, h), f"{moe}.output_linear.weight": (experts, h, i)}
    return names


def _gpt_oss_names(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, i, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    names = _sequential_names(config)
    for n in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
        for letter in "qkvo":
            rows = names[f"{attention}.{letter}_proj.weight"][0]
            names[f"{attention}.{letter}_proj.bias"] = (rows,)
        names[f"{attention}.sinks"] = (config["num_attention_heads"],)
        names |= {f"{mlp}.router.weight": (experts, h), f"{mlp}.router.bias": (experts,)}
        names |= {f"{mlp}.experts.gate_up_proj": (experts, h, 2 * i), f"{mlp}.experts.down_proj": (experts, i, h)}
        names |= {f"{mlp}.experts.gate_up_proj_bias": (experts, 2 * i), f"{mlp}.experts.down_proj_bias": (experts, h)}
    return names


NAMES = {
    "phimoe": _llama_names, "mixtral": _llama_names, "phi-msft": _phi_names, "qwen3_moe": _qwen_names,
    "granitemoe": _granite_names, "olmoe": _qwen_names, "qwen2_moe": _qwen_names, "gpt_oss": _gpt_oss_names,
}  # fmt: skip


class Reference:
    """transformers (or what stands in for it) on the same weights, one full forward at a time, in the given dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        config = json.loads((folder / "config.json").read_text())
        load = {"phimoe": _load_phimoe, "phi-msft": _load_phixtral}.get(config["model_type"], _load_stock)
        self.model = load(folder, config, dtype).eval()

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> Tensor:
        """[len(token_ids), vocab_size] fp32"""
        out: Tensor = self.model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
        return out.float()

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Each token from a full recompute of everything before it."""
        token_ids = list(prompt)
        for _ in range(num_tokens):
            token_ids.append(int(self.logits(token_ids)[-1].argmax()))
        return token_ids[len(prompt) :]


_EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def _load_phimoe(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    from transformers import PhimoeForCausalLM
    from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

    class Rotary(PhimoeRotaryEmbedding):  # type: ignore[misc]
        """The stock class never switches to the long factors: rope_init_fn is called without the length."""

        @torch.no_grad()
        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            rope = self.config.rope_parameters
            length = int(position_ids.max()) + 1
            inv_freq, mscale = self.rope_init_fn(self.config, device=x.device, seq_len=length)
            if rope["rope_type"] != "default":
                is_long = length > rope["original_max_position_embeddings"]
                mscale = rope["long_mscale"] if is_long else rope["short_mscale"]
            angles = position_ids[..., None].float() * inv_freq.float()
            angles = torch.cat((angles, angles), dim=-1)
            return (angles.cos() * mscale).to(x.dtype), (angles.sin() * mscale).to(x.dtype)

    model = PhimoeForCausalLM.from_pretrained(folder, dtype=dtype, **_EAGER)
    model.model.rotary_emb = Rotary(model.config)
    return model  # type: ignore[no-any-return]


def _load_stock(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **_EAGER)  # type: ignore[no-any-return]


class _PhiMoE(nn.Module):
    """phixtral's routing over transformers' PhiMLP: top-k of the logits, softmax over those, weighted sum."""

    def __init__(self, make_mlp: Any, config: dict[str, Any]) -> None:
        super().__init__()
        self.mlp = nn.ModuleList(make_mlp() for _ in range(config["num_local_experts"]))
        self.gate = nn.Linear(config["n_embd"], config["num_local_experts"], bias=False)
        self.top_k = config["num_experts_per_tok"]

    def forward(self, x: Tensor) -> Tensor:
        best, ids = self.gate(x).sort(dim=-1, descending=True, stable=True)
        weights = best[..., : self.top_k].softmax(-1)
        every = torch.stack([mlp(x) for mlp in self.mlp], dim=-1)
        chosen = every.gather(-1, ids[..., None, : self.top_k].expand(*x.shape, self.top_k))
        return (chosen * weights[..., None, :]).sum(-1)


def _load_phixtral(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    from transformers import PhiConfig, PhiForCausalLM
    from transformers.models.phi.modeling_phi import PhiMLP

    heads, h = config["n_head"], config["n_embd"]
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": config["rotary_dim"] / (h // heads)}
    phi = PhiConfig(
        vocab_size=config["vocab_size"], hidden_size=h, intermediate_size=config["n_inner"] or 4 * h,
        num_hidden_layers=config["n_layer"], num_attention_heads=heads, num_key_value_heads=heads,
        hidden_act="gelu_new", max_position_embeddings=config["n_positions"], rope_parameters=rope,
        layer_norm_eps=config["layer_norm_epsilon"], tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    model = PhiForCausalLM(phi)
    for layer in model.model.layers:
        layer.mlp = _PhiMoE(lambda: PhiMLP(phi), config)
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for old, new in (
            ("transformer.embd.wte", "model.embed_tokens"), ("transformer.h.", "model.layers."),
            (".ln.", ".input_layernorm."), ("lm_head.input_layernorm", "model.final_layernorm"),
            ("lm_head.linear", "lm_head"), ("mixer.out_proj", "self_attn.dense"), (".moe.", ".mlp."),
        ):  # fmt: skip
            name = name.replace(old, new)
        if "mixer.Wqkv" in name:
            for letter, part in zip("qkv", tensor.view(3, h, *tensor.shape[1:]), strict=True):
                renamed[name.replace("mixer.Wqkv", f"self_attn.{letter}_proj")] = part
        else:
            renamed[name] = tensor
    model.load_state_dict(renamed)
    return model.to(dtype)  # type: ignore[no-any-return]
