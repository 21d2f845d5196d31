"""The supported families, by the model_type of their config.json."""

from moray.engine.models.base import CausalLM
from moray.engine.models.gpt_oss import GptOssForCausalLM
from moray.engine.models.granitemoe import GraniteMoeForCausalLM
from moray.engine.models.mixtral import MixtralForCausalLM
from moray.engine.models.olmoe import OlmoeForCausalLM
from moray.engine.models.phi_msft import PhiMsftForCausalLM
from moray.engine.models.phimoe import PhimoeForCausalLM
from moray.engine.models.qwen2_moe import Qwen2MoeForCausalLM
from moray.engine.models.qwen3_moe import Qwen3MoeForCausalLM

ARCHITECTURES: dict[str, type[CausalLM]] = {
    "phimoe": PhimoeForCausalLM,
    "phi-msft": PhiMsftForCausalLM,
    "mixtral": MixtralForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "granitemoe": GraniteMoeForCausalLM,
    "olmoe": OlmoeForCausalLM,
    "qwen2_moe": Qwen2MoeForCausalLM,
    "gpt_oss": GptOssForCausalLM,
}
