"""SequentialForCausalLM: models whose blocks come one after the other, each after a norm, as in Llama."""

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from moray.engine.backends.formats import ExpertOutput
from moray.engine.backends.inputs import ModelInputs
from moray.engine.config import ModelConfig
from moray.engine.layers.attention import SelfAttention
from moray.engine.layers.embedding import Embedding, TiedHead
from moray.engine.layers.linear import GatheredLinear
from moray.engine.layers.moe import DenseMlp, SharedExpert, SparseMoe
from moray.engine.layers.norm import Norm, RMSNorm
from moray.engine.layers.rotary import Rotary, RotaryEmbedding
from moray.engine.models.base import CausalLM
from moray.engine.models.tensors import TensorMap, plain
from moray.engine.partition import WHOLE, Partition


def rms_norm(config: ModelConfig) -> Norm:
    """Return an RMSNorm of the model's width."""
    return RMSNorm(config.hidden_size, config.norm_eps, config.residual_multiplier, config.norm_rounds_last)


class SequentialLayer(nn.Module):
    """Runs attention, and then experts or an MLP, each with a norm before it."""

    def __init__(
        self,
        config: ModelConfig,
        self_attn: SelfAttention,
        moe: SparseMoe | DenseMlp,
        shared: SharedExpert | None = None,
        *,
        make_norm: Callable[[ModelConfig], Norm] = rms_norm,
    ) -> None:
        """Make the layer.

        shared:     the expert that all tokens go through besides; None = there is none
        make_norm:  makes each norm
        """
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = self_attn
        self.post_attention_layernorm = make_norm(config)
        self.moe = moe
        self.shared = shared

    def forward(
        self, x: Tensor | ExpertOutput, residual: Tensor | None, rotary: Rotary, inputs: ModelInputs
    ) -> tuple[Tensor | ExpertOutput, Tensor]:
        """Run the layer. x and residual come from the layer before it; the next norm adds up what is returned."""
        h, residual = self.input_layernorm.add(x, residual)
        h = self.self_attn(h, rotary, inputs)
        h, residual = self.post_attention_layernorm.add(h, residual)
        out = self.moe(h, inputs.num_tokens)
        return out, residual if self.shared is None else residual + self.shared(h, inputs.num_tokens)


class SequentialForCausalLM(CausalLM):
    """Runs the whole model. A family says what a layer is and maps its tensors, and may have another last norm."""

    def __init__(self, config: ModelConfig, partition: Partition = WHOLE) -> None:
        super().__init__(config, partition)
        self.logits_scaling = config.logits_scaling
        self.rotary = RotaryEmbedding(config.rope)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.embedding_multiplier)
        self.layers = nn.ModuleList(self.make_layer(config, n, partition) for n in range(config.num_layers))
        self.norm = self.make_norm(config)
        self.lm_head = (
            TiedHead(self.embed_tokens, partition)
            if config.tie_word_embeddings
            else GatheredLinear(config.hidden_size, config.vocab_size, partition, bias=config.lm_head_bias)
        )

    @staticmethod
    @abstractmethod
    def make_layer(config: ModelConfig, n: int, partition: Partition) -> SequentialLayer:
        """Return layer n, counted from 0."""

    @staticmethod
    def make_norm(config: ModelConfig) -> Norm:
        """Return the norm after the last layer."""
        return rms_norm(config)

    def forward(self, inputs: ModelInputs) -> Tensor:
        rotary = self.rotary(inputs.positions, inputs.rope_sets)
        x, residual = self.embed_tokens(inputs.input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, rotary, inputs)
        return self.norm.add(x, residual)[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden_states)
        return logits if self.logits_scaling == 1.0 else logits / self.logits_scaling


def map_outside_layers(config: ModelConfig, norm_parts: tuple[str, ...] = ("weight",)) -> TensorMap:
    """Map the embedding, the final norm, the head unless it is tied, and the norms of the layers.

    norm_parts: the tensors of a norm
    """
    h, v = config.hidden_size, config.vocab_size
    targets = plain("model.embed_tokens", "embed_tokens", (v, h), "weight")
    targets |= plain("model.norm", "norm", (h,), *norm_parts)
    if not config.tie_word_embeddings:
        targets |= plain("lm_head", "lm_head", (v, h), *(("weight", "bias") if config.lm_head_bias else ("weight",)))
    for n in range(config.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            targets |= plain(f"model.layers.{n}.{norm}", f"layers.{n}.{norm}", (h,), *norm_parts)
    return targets
