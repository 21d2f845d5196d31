"""QuantizedWeights: the weights of a model that are quantized in memory, read and packed one after the other."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moray.engine.backends.base import Backend
from moray.engine.checkpoint.stored_weights import check_multiplied_together
from moray.engine.checkpoint.weights import Target, TensorMap, first_row
from moray.engine.layers.linear import Linear
from moray.engine.layers.moe import Experts
from moray.engine.quantization.choose import stored_format
from moray.engine.quantization.scheme import Scheme
from moray.engine.quantization.stored_part import StoredPart
from moray.engine.quantization.weight import QuantizedWeight, stack_rows

SUFFIX = ".weight"
READ_AHEAD = 1  # weights that are read while one is quantized


class _Weight(NamedTuple):
    """Names a published weight, which fills some rows of a parameter.

    module:  published name of the linear module
    shape:   (out_features, in_features)
    first:   the first row of the parameter that it fills
    """

    module: str
    shape: tuple[int, int]
    first: int

    @property
    def size(self) -> tuple[str, tuple[int, int]]:
        """Return what a StoredFormat asks for: the module and the shape."""
        return self.module, self.shape


class _Rows(NamedTuple):
    """The rows of a published weight that this model has; None = all."""

    weight: _Weight
    held: tuple[slice, ...] | None


class TensorSource(Protocol):
    """Where stored tensors come from: a Checkpoint, or what a benchmark makes up."""

    def read(
        self, parts: Mapping[str, StoredPart], device: torch.device, rows: Sequence[slice] | None, /
    ) -> Mapping[str, Tensor]:
        """Return those of the tensors that are stored, as they are stored, in new memory on the device.

        rows: the rows of each that are read, one slice after the other; None = all
        """


class QuantizedWeights:
    """Reads and packs the weights of a model that are quantized in memory.

    params:  names of the parameters that hold them in the model
    parts:   stored name -> tensor, of all of them
    extras:  see StoredFormat

    Raises CheckpointError if the scheme leaves out some weights of a layer whose other weights are quantized.
    """

    def __init__(self, scheme: Scheme | None, tensor_map: TensorMap) -> None:
        self._scheme = scheme
        self.params: dict[str, dict[int, list[_Weight]]] = {}  # param -> expert, 0 without -> weights, by rows
        self.parts: dict[str, StoredPart] = {}
        self.extras: re.Pattern[str] | None = None
        if scheme is None:
            return
        self._stored = stored_format(scheme)
        self._plain = {name for name, target in tensor_map.items() if not _is_quantized(scheme, name, target)}
        self.extras = self._stored.extras
        layers: dict[str, list[str]] = {}  # name of a layer, whose kernel multiplies all its weights -> its modules
        for name, target in tensor_map.items():
            if name.endswith(SUFFIX) and len(target.shape) == 2:
                layers.setdefault(target.param.rpartition(".")[0], []).append(name.removesuffix(SUFFIX))
        check_multiplied_together(scheme, layers)
        for name, target in sorted(tensor_map.items(), key=lambda item: first_row(item[1])):
            if _is_quantized(scheme, name, target):
                shape = target.shape[0], target.shape[1]
                weight = _Weight(name.removesuffix(SUFFIX), shape, first_row(target))
                self.params.setdefault(target.param, {}).setdefault(_expert(target), []).append(weight)
                self.parts |= self._parts(weight)

    def packers(self, model: nn.Module, source: TensorSource) -> dict[str, Callable[[nn.Module, Backend], None]]:
        """Return name of a layer -> what reads, quantizes and packs its weights. Call them in the order of the layers.

        While a weight is quantized the next one is read.
        """
        layers = {name: module for name, module in model.named_modules() if self._params_of(name, module)}
        order = [rows for name, module in layers.items() for rows in self._in_order(name, module)]
        weights: list[Iterator[QuantizedWeight]] = []

        def pack(name: str, module: nn.Module, backend: Backend) -> None:
            if not weights:
                weights.append(self._assemble(order, source, backend.torch_device))
            self._pack(name, module, backend, weights[0])

        return {name: partial(pack, name) for name in layers}

    def _parts(self, weight: _Weight) -> dict[str, StoredPart]:
        """Return what is stored of a weight; a bias that the model has is no part of it."""
        parts = self._stored.parts(*weight.size)
        return {name: part for name, part in parts.items() if name not in self._plain}

    def _params_of(self, name: str, module: nn.Module) -> list[dict[int, list[_Weight]]]:
        """Return the quantized parameters of a layer: those of experts are two."""
        names = [f"{name}.{attribute}" for attribute in _attributes(module)]
        return [self.params[param] for param in names if param in self.params]

    def _in_order(self, name: str, module: nn.Module) -> Iterator[_Rows]:
        assert isinstance(module, Experts | Linear), f"{name} has no weights of outputs"
        held = [module.held_rows(attribute) for attribute in _attributes(module)]
        params = self._params_of(name, module)
        for part in _held_parts(module, params[0]):
            for param, rows in zip(params, held, strict=True):
                for weight in param[part]:
                    overlaps = rows.overlaps(weight.first, weight.first + weight.shape[0])
                    yield _Rows(weight, None if rows.is_whole else tuple(of_stored for of_stored, _ in overlaps))

    def _assemble(
        self, order: Iterable[_Rows], source: TensorSource, device: torch.device
    ) -> Iterator[QuantizedWeight]:
        def read(rows: _Rows) -> Mapping[str, Tensor]:
            return source.read(self._parts(rows.weight), device, rows.held if self._stored.is_read_by_rows else None)

        order = list(order)
        tensors = _read_ahead(read, order)
        for weight, held in order:
            if held is None or not self._stored.is_read_by_rows:
                whole = self._stored.assemble(*weight.size, next(tensors))
                yield whole if held is None else whole.take_rows(held)
            else:
                num_rows = sum(part.stop - part.start for part in held)
                yield self._stored.assemble(weight.module, (num_rows, weight.shape[1]), next(tensors))

    def _pack(self, name: str, module: nn.Module, backend: Backend, weights: Iterator[QuantizedWeight]) -> None:
        params = self._params_of(name, module)

        def stack(pieces: list[_Weight]) -> QuantizedWeight:
            return stack_rows([next(weights) for _ in pieces])

        if isinstance(module, Experts):
            assert self._scheme is not None
            experts = ((stack(params[0][e]), stack(params[1][e])) for e in _held_parts(module, params[0]))
            module.pack_quantized(self._scheme.kind, experts, backend)
        else:
            assert isinstance(module, Linear), f"{name} is no linear layer"
            module.pack_quantized(stack(params[0][0]), backend)


def _is_quantized(scheme: Scheme, name: str, target: Target) -> bool:
    return name.endswith(SUFFIX) and len(target.shape) == 2 and scheme.quantizes(name.removesuffix(SUFFIX))


def _expert(target: Target) -> int:
    """Return the expert whose weight a tensor is part of; 0 for the weight of a linear layer."""
    first = target.index[0] if target.index else 0
    return first if isinstance(first, int) else 0


def _held_parts(module: nn.Module, param: Mapping[int, object]) -> Sequence[int]:
    """Return the experts of a parameter that this rank has, in order; 0 for a linear layer."""
    return module.held if isinstance(module, Experts) else sorted(param)


def _attributes(module: nn.Module) -> tuple[str, ...]:
    """Return the attributes of a layer that hold weights."""
    return (module.up, module.down) if isinstance(module, Experts) else ("weight",)


def _read_ahead(
    read: Callable[[_Rows], Mapping[str, Tensor]], order: Iterable[_Rows]
) -> Iterator[Mapping[str, Tensor]]:
    """Read weights in a thread, in order, READ_AHEAD of them before they are asked for."""
    ahead: deque[Future[Mapping[str, Tensor]]] = deque()
    with ThreadPoolExecutor(1, "read") as thread:
        for weight in order:
            ahead.append(thread.submit(read, weight))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
