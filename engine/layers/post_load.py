"""Give the layers of a loaded model their backend: kernels are chosen and weights packed, once."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from torch import nn

from moray.engine.backends.base import Backend

NO_PACKERS: Mapping[str, Any] = MappingProxyType({})


@runtime_checkable
class PostLoadLayer(Protocol):
    """Marks a layer whose kernels or weight layout depend on the backend."""

    def process_weights_after_loading(self, backend: Backend) -> None:
        """Take the kernels from the backend and let it pack the weights. Call it once, before the first forward.

        Weights that are not read any more are freed.
        """


def process_weights_after_loading(
    model: nn.Module, backend: Backend, packers: Mapping[str, Callable[[nn.Module, Backend], None]] = NO_PACKERS
) -> None:
    """Process all layers of a model, one after the other: no more than one layer's weights are in memory twice.

    packers: name of a layer -> what packs its weights, of layers whose weights are quantized
    """
    with backend.packing():
        for name, module in model.named_modules():
            if name in packers:
                packers[name](module, backend)
            elif isinstance(module, PostLoadLayer):
                module.process_weights_after_loading(backend)
