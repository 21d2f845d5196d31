"""The formats of quantized weights that whole models are measured with, beside bf16."""

import copy

from gpu.cases_quantized import weights_of
from gpu.roofline import DENSE, Weights
from moray.engine.backends.base import Backend
from moray.engine.backends.cuda.quantized import PackedCodesFormat
from moray.engine.quantization.scheme import OnLoadKind
from moray.kernels.gpu.grouped_gemm import QuantizedCase, is_multiplied
from moray.kernels.gpu.tuning import device as gpu

BF16 = "bf16"
# What on_load.py makes, and fp8 weights by rows in fp8, which the engine has no setting for.
CASES: dict[str, QuantizedCase] = {
    "int8": QuantizedCase("int8"),
    "int4": QuantizedCase("int4", 128),
    "fp8": QuantizedCase("fp8"),
    "fp8_fp8": QuantizedCase("fp8_fp8"),
}


def model_formats(*, is_dry: bool) -> list[str]:
    """Return the names of the formats that this GPU multiplies; the interpreter multiplies all."""
    return [name for name, case in CASES.items() if is_dry or is_multiplied(case.format, gpu())]


def kind_of(name: str) -> OnLoadKind | None:
    """Return what model.quantization would be."""
    kinds: dict[str, OnLoadKind] = {"int8": "int8", "int4": "int4", "fp8": "fp8", "fp8_fp8": "fp8"}
    return kinds.get(name)


def weights_in(name: str) -> Weights:
    """Return the bytes and the speed that bounds take."""
    return DENSE if name == BF16 else weights_of(CASES[name])


def with_format(backend: Backend, name: str) -> Backend:
    """Return the backend, with the kernels that multiply rows in fp8 where the format has such."""
    if name != "fp8_fp8":
        return backend
    other = copy.copy(backend)
    other.quantized_formats = {**backend.quantized_formats, "fp8": PackedCodesFormat("fp8_fp8")}
    return other
