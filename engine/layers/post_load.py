"""Give the layers of a loaded model their backend: kernels are chosen and weights packed, once."""

from typing import Protocol, runtime_checkable

from torch import nn

from moray.engine.backends.base import Backend


@runtime_checkable
class PostLoadLayer(Protocol):
    """A layer whose kernels or weight layout depend on the backend."""

    def process_weights_after_loading(self, backend: Backend) -> None:
        """Take the kernels from the backend and let it pack the weights. Call it once, before the first forward.

        Weights that are not read any more are freed.
        """


def process_weights_after_loading(model: nn.Module, backend: Backend) -> None:
    """Process all layers of a model, one after the other: no more than one layer's weights are in memory twice."""
    with backend.packing():
        for module in model.modules():
            if isinstance(module, PostLoadLayer):
                module.process_weights_after_loading(backend)
