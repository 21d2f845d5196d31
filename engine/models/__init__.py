"""The architectures, by the model_type of their config.json."""

from collections.abc import Callable

from engine.config import ModelConfig
from engine.models import mixtral, phi_msft, phimoe
from engine.models.tensors import TensorMap

CausalLM = phimoe.PhimoeForCausalLM | phi_msft.PhiMsftForCausalLM | mixtral.MixtralForCausalLM

ARCHITECTURES: dict[str, tuple[Callable[[ModelConfig], CausalLM], Callable[[ModelConfig], TensorMap]]] = {
    "phimoe": (phimoe.PhimoeForCausalLM, phimoe.tensor_map),
    "phi-msft": (phi_msft.PhiMsftForCausalLM, phi_msft.tensor_map),
    "mixtral": (mixtral.MixtralForCausalLM, mixtral.tensor_map),
}
