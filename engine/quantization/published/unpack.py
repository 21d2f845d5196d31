"""Published: reads the tensors of a published quantized weight into a QuantizedWeight, exactly: no code is rounded."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moray.engine.errors import CheckpointError
from moray.engine.quantization.published import METHODS
from moray.engine.quantization.published.names import ACTIVATIONS
from moray.engine.quantization.scheme import CODE_BITS, Scheme
from moray.engine.quantization.stored_part import StoredPart
from moray.engine.quantization.weight import QuantizedWeight
from moray.kernels.e2m1 import scales_of

MAX_EXPONENT = 252  # of a scale: its largest number, 6 * 2 ** (252 - 127), is the largest that bfloat16 holds
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 outputs each code of a word is, low bits first


class Published:
    """Reads a checkpoint that is published quantized; a StoredFormat."""

    def __init__(self, scheme: Scheme) -> None:
        self.is_read_by_rows = scheme.layout == "blocks"  # some other layouts pack several rows into a word
        self.extras: re.Pattern[str] | None = ACTIVATIONS
        self._scheme = scheme
        self._method = METHODS[scheme.method]
        self._assemble = ASSEMBLERS[scheme.layout]

    def parts(self, module: str, shape: tuple[int, int]) -> Mapping[str, StoredPart]:
        """Return stored name -> tensor, for the module's weight."""
        return {f"{module}.{suffix}": part for suffix, part in self._method.parts(self._scheme, shape).items()}

    def assemble(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return the weight from its stored tensors.

        Raises CheckpointError naming the tensor, if its values contradict the config or are no numbers.
        """
        stored = {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items()}
        try:
            weight = self._assemble(self._scheme, shape, stored)
            _check(not weight.scales.isfinite().all(), "scales", "has a scale that is infinite or no number")
        except _Contradiction as mistake:
            raise CheckpointError(f"{module}.{mistake}.") from None
        return weight


class _Contradiction(Exception):
    """Names a tensor, without its module, and what is wrong with it."""


def _check(is_wrong: Tensor | bool, name: str, problem: str) -> None:
    if is_wrong:
        raise _Contradiction(f"{name} {problem}")


def _elements(scheme: Scheme, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> QuantizedWeight:
    """Read codes that are stored one by one."""
    codes, zeros = stored["weight"], stored.get("weight_zero_point")
    if scheme.kind == "fp8":
        _check((codes.view(torch.uint8) & 0x7F == 0x7F).any(), "weight", "has a value that is no number")
    elif scheme.kind == "int4":
        _check((codes < -8).any() | (codes > 7).any(), "weight", "has a code beyond 4 bits")
    scales = stored["weight_scale" if "weight_scale" in stored else "weight_scale_inv"]
    if zeros is not None and scheme.symmetric:
        _check((zeros.float() != 0).any(), "weight_zero_point", "is not 0, but the config says that it is symmetric")
        zeros = None
    return _weight(
        scheme, shape, codes, _by_row(scheme, shape, scales), None if zeros is None else zeros.view(torch.int8)
    )


def _words(scheme: Scheme, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> QuantizedWeight:
    """Read codes that lie in words along the inputs."""
    bits = CODE_BITS[scheme.kind]
    said = stored["weight_shape"].tolist()
    _check(said != list(shape), "weight_shape", f"is {said}, but the model's config makes it {list(shape)}")
    codes = _unpack(stored["weight_packed"], bits)[:, : shape[1]]
    zeros = None
    if not scheme.symmetric:
        zeros = _unpack(stored["weight_zero_point"].T, bits)[:, : shape[0]].T
    return _weight(scheme, shape, codes, _by_row(scheme, shape, stored["weight_scale"]), zeros)


def _gptq(scheme: Scheme, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> QuantizedWeight:
    """Read codes that lie in words along the inputs, transposed, with zero points that lie along the outputs."""
    (rows, inputs), bits = shape, CODE_BITS[scheme.kind]
    if (groups := stored.get("g_idx")) is not None:
        plain = torch.arange(inputs, device=groups.device) // (scheme.group_size or inputs)
        _check(
            not torch.equal(groups.long(), plain),
            "g_idx",
            "permutes the inputs (desc_act), which is not supported; quantize with desc_act false",
        )
    if (bias := stored.get("bias")) is not None:
        _check((bias != 0).any(), "bias", "is not 0, but the model has no bias there")
    codes = _unpack(stored["qweight"].T, bits)[:, :inputs]
    zeros = _unpack(stored["qzeros"], bits)[:, :rows].T
    if scheme.layout == "gptq":
        zeros = zeros + 1  # stored one smaller; the smallest as the largest
        if bits == 4:
            zeros[zeros == 8] = -8
    if scheme.symmetric:
        _check((zeros != 0).any(), "qzeros", "has other zero points than sym, which the config says, would have")
    return _weight(scheme, shape, codes, stored["scales"].T, None if scheme.symmetric else zeros)


def _awq(scheme: Scheme, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> QuantizedWeight:
    """Read codes that lie in words along the outputs, in AWQ_ORDER."""

    def read(words: Tensor) -> Tensor:
        by_output = words.T.contiguous()
        numbers = torch.empty(len(by_output), 8, len(words), dtype=torch.int8, device=words.device)
        for place, output in enumerate(AWQ_ORDER):
            numbers[:, output] = (by_output >> (4 * place)) & 0xF
        return numbers.flatten(0, 1)[: shape[0]] - 8

    return _weight(scheme, shape, read(stored["qweight"]), stored["scales"].T, read(stored["qzeros"]))


def _blocks(scheme: Scheme, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> QuantizedWeight:
    """Read e2m1, two codes a byte, the lower half first, and the exponents of their groups' scales."""
    octets, exponents = stored["blocks"], stored["scales"]
    _check((exponents > MAX_EXPONENT).any(), "scales", f"has an exponent beyond {MAX_EXPONENT}, or one of no number")
    codes = torch.stack([octets & 0xF, octets >> 4], dim=-1).flatten(1)[:, : shape[1]]
    return _weight(scheme, shape, codes, scales_of(exponents), None)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Return the numbers in words of 32 bits, low bits first, less half of their range.

    words: [rows, words] int32; the result: [rows, words * 32 / bits] int8
    """
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (octets ^ 0x80).view(torch.int8)
    return torch.stack([octets & 0xF, octets >> 4], dim=-1).flatten(1).view(torch.int8) - 8


def _by_row(scheme: Scheme, shape: tuple[int, int], scales: Tensor) -> Tensor:
    """Return the scales of each row: those of one weight or of blocks of rows are repeated."""
    if scheme.is_per_tensor:
        return scales.reshape(1, 1).expand(shape[0], 1)
    return scales.reshape(-(-shape[0] // scheme.block_rows), -1).repeat_interleave(scheme.block_rows, 0)[: shape[0]]


def _weight(
    scheme: Scheme, shape: tuple[int, int], codes: Tensor, scales: Tensor, zeros: Tensor | None
) -> QuantizedWeight:
    return QuantizedWeight(
        scheme.kind,
        codes.contiguous(),
        scales.float().contiguous(),
        min(scheme.group_size or shape[1], shape[1]),
        None if zeros is None else zeros.contiguous(),
    )


ASSEMBLERS: Mapping[str, Callable[[Scheme, tuple[int, int], Mapping[str, Tensor]], QuantizedWeight]] = {
    "elements": _elements,
    "words": _words,
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq": _awq,
    "blocks": _blocks,
}
