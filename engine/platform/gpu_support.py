"""The GPUs that the kernels run on, by compute capability. No torch: it is checked before a model is loaded."""

MIN_CAPABILITY = (7, 5)  # Turing: no CUDA version that torch is built for today supports older GPUs
MIN_BFLOAT16_CAPABILITY = (8, 0)  # Ampere: older GPUs have no bfloat16


def find_capability_problem(capability: tuple[int, int], dtype: str | None = None) -> str | None:
    """Return why the kernels do not run on a GPU of this compute capability, or not in this dtype; None if they do.

    dtype: its name, such as "bfloat16"; None = not known yet
    """
    required = MIN_BFLOAT16_CAPABILITY if dtype == "bfloat16" else MIN_CAPABILITY
    if capability >= required:
        return None
    has = f"it has compute capability {_dotted(capability)}"
    if capability < MIN_CAPABILITY:
        return f"{has}; the kernels need {_dotted(MIN_CAPABILITY)}, and {_dotted(MIN_BFLOAT16_CAPABILITY)} for bfloat16"
    return f"{has}; bfloat16 needs {_dotted(required)}. Use float16 or float32, or a newer GPU"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
