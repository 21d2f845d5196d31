"""The supported families, by the model_type of their config.json."""

from moray.engine.models.base import CausalLM
from moray.engine.models.mixtral import MixtralForCausalLM
from moray.engine.models.phi_msft import PhiMsftForCausalLM
from moray.engine.models.phimoe import PhimoeForCausalLM

ARCHITECTURES: dict[str, type[CausalLM]] = {
    "phimoe": PhimoeForCausalLM,
    "phi-msft": PhiMsftForCausalLM,
    "mixtral": MixtralForCausalLM,
}
