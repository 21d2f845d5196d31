"""Published figures of the models that are measured here, to hold a GPU to. Conditions differ: read them with the
figure. They were taken from the sources named; nothing here was measured by this project."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Anchor:
    """Holds a published figure.

    model:        folder of configs/
    weights:      of our rows to compare with, the first that is there
    tokens_per_s: of one GPU
    what:         what it counts
    source:       where it was published
    conditions:   under which it was measured
    """

    model: str
    weights: tuple[str, ...]
    tokens_per_s: float
    what: str
    source: str
    conditions: str


ANCHORS = (
    Anchor(
        "mixtral-8x7b",
        ("fp8", "int8", "bf16"),
        7417,
        "output, per GPU",
        "MLPerf Inference v4.1, closed, offline (github.com/mlcommons/inference_results_v4.1)",
        "8 H200, TensorRT-LLM, FP8, GigaComputing G593-SD1: 59,335 tokens/s; prompts of several data sets",
    ),
    Anchor(
        "gpt-oss-20b",
        ("int4", "bf16"),
        9064,
        "output",
        "GPUStack performance lab (github.com/gpustack/gpustack, docs/performance-lab/gpt-oss-20b/h100.md)",
        "1 H100 80 GB, vLLM 0.11, MXFP4, 1,000 prompts of ShareGPT at once",
    ),
    Anchor(
        "qwen3-30b-a3b",
        ("bf16",),
        2319,
        "output while decoding",
        "mini-sglang (github.com/sgl-project/mini-sglang, pull request 59)",
        "one GPU whose name is not given, bf16, 157 sequences at once",
    ),
    Anchor(
        "qwen3-30b-a3b",
        ("fp8", "int8"),
        4337,
        "output",
        "vLLM (github.com/vllm-project/vllm, pull request 17530)",
        "1 MI300X, FP8, 200 prompts of 1,000 tokens, outputs of 2,000",
    ),
    Anchor(
        "phi-3.5-moe",
        ("bf16",),
        640,
        "output, per GPU",
        "SGLang (github.com/sgl-project/sglang, pull request 7907)",
        "2 H100, bf16, GSM8K: 1,280 tokens/s",
    ),
)
