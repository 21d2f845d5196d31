"""CausalLM: the interface of a model family."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from moray.engine.backends.inputs import ModelInputs
from moray.engine.config import ModelConfig
from moray.engine.models.tensors import TensorMap
from moray.engine.partition import WHOLE, Partition


class CausalLM(nn.Module, ABC):
    """Predicts each token from those before it. A family is a subclass in a file of its own.

    The parameters are empty after __init__, and are filled from a checkpoint according to tensor_map.
    """

    @abstractmethod
    def __init__(self, config: ModelConfig, partition: Partition = WHOLE) -> None:
        """Make the layers, of which a rank has its part. partition: the place of this rank"""
        super().__init__()

    @staticmethod
    @abstractmethod
    def tensor_map(config: ModelConfig) -> TensorMap:
        """Map each published tensor name to its place in the parameters, as if one rank had all of each."""

    @abstractmethod
    def forward(self, inputs: ModelInputs) -> Tensor:
        """Return the hidden states after the final norm, [num_tokens, hidden_size]."""

    @abstractmethod
    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits [n, vocab_size] of hidden states [n, hidden_size]."""

    def validate_weights(self) -> None:
        """Check the loaded weights before they are packed: log what is unusual, raise CheckpointError if need be."""
