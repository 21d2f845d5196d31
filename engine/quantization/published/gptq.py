"""GPTQ, as AutoGPTQ, GPTQModel and AutoRound write it: integers of 4 and 8 bits, packed along the inputs."""

import re
from collections.abc import Mapping
from typing import Any

from moray.engine.float_dtypes import STORED_FLOATS
from moray.engine.json_options import JsonOptions
from moray.engine.quantization.matrix_names import MatrixNames
from moray.engine.quantization.published.method import PublishedMethod, num_groups
from moray.engine.quantization.published.names import check_patterns, regular
from moray.engine.quantization.scheme import CODE_BITS, Scheme
from moray.engine.quantization.stored_part import StoredPart

# How the weights were found, or how other programs run them: they change no weight.
HARMLESS = (
    "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "act_group_aware", "mse", "dataset",
    "tokenizer", "batch_size", "pad_token_id", "model_seqlen", "max_input_length", "block_name_to_quantize",
    "module_name_preceding_first_block", "cache_block_outputs", "model_name_or_path", "model_file_base_name",
    "backend", "use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "parallel_packing", "meta",
    "quantizer", "iters", "seqlen", "nsamples", "autoround_version", "enable_quanted_input", "low_gpu_mem_usage",
)  # fmt: skip


def _read(options: JsonOptions, names: MatrixNames) -> Scheme:
    options.expect_only(
        *HARMLESS, "quant_method", "method", "bits", "group_size", "desc_act", "sym", "checkpoint_format", "format",
        "modules_in_block_to_quantize", "dynamic", "lm_head", "pack_dtype", "is_marlin_format", "awq_gemm_checkpoint",
    )  # fmt: skip
    for key in ("is_marlin_format", "awq_gemm_checkpoint"):
        options.expect(key, False)
    options.expect("pack_dtype", "int32")
    if options.value("bits") not in (4, 8):
        options.refuse(options.describe("bits"), "4 or 8")
    layout = options.one_of("checkpoint_format", "format") or "gptq"
    for key in ("checkpoint_format", "format"):
        options.expect(key, "gptq", "gptq_v2")
    group_size = read_group_size(options)
    if options.flag("desc_act") and group_size is not None and options.value("static_groups") is not True:
        options.refuse(
            f"{options.describe('desc_act')} with groups of {group_size} inputs",
            "desc_act false, or a group_size of -1",
        )
    ignore = [names.embedding, names.router]
    if not options.flag("lm_head"):
        ignore.append(names.head)
    return Scheme(
        "gptq",
        "int4" if options.value("bits") == 4 else "int8",
        group_size,
        symmetric=options.value("sym") is not False,
        layout="gptq" if layout == "gptq" else "gptq_v2",
        ignore=(*ignore, *check_patterns(options, "dynamic", _skipped(options))),
        targets=tuple(rf"(?:.*\.)?{re.escape(name)}" for name in _targets(options)),
    )


def read_group_size(options: JsonOptions, default: int | None = None) -> int | None:
    """Return group_size; None for -1, which means that a row has one scale."""
    return None if options.value("group_size") == -1 else options.whole("group_size", default)


def _skipped(options: JsonOptions) -> tuple[str, ...]:
    """Return the patterns of the modules that `dynamic` leaves as they are; what else it says is refused."""
    rules: dict[str, Any] = dict(options.inner("dynamic").values)
    if any(not rule.startswith("-:") for rule in rules):
        options.refuse(options.describe("dynamic"), "rules that begin with -: (modules that are not quantized)")
    return tuple(regular(rule.removeprefix("-:")) for rule in rules if rule.startswith("-:"))


def _targets(options: JsonOptions) -> tuple[str, ...]:
    """Return modules_in_block_to_quantize, which is a list of names or of lists of them."""
    key, value = "modules_in_block_to_quantize", options.value("modules_in_block_to_quantize")
    if isinstance(value, list):
        value = [name for item in value for name in (item if isinstance(item, list) else [item])]
    return JsonOptions({key: value}, prefix=options.prefix, problems=options.problems).texts(key)


def _parts(scheme: Scheme, shape: tuple[int, int]) -> Mapping[str, StoredPart]:
    (rows, inputs), bits, groups = shape, CODE_BITS[scheme.kind], num_groups(scheme, shape)
    return {
        "qweight": StoredPart((-(-inputs * bits // 32), rows), ("I32",)),
        "qzeros": StoredPart((groups, -(-rows * bits // 32)), ("I32",)),
        "scales": StoredPart((groups, rows), STORED_FLOATS),
        "g_idx": StoredPart((inputs,), ("I32", "I64"), is_optional=True),
        "bias": StoredPart((rows,), STORED_FLOATS, is_optional=True),  # zeros, where the model has none
    }


def _shape(scheme: Scheme, stored: tuple[int, ...]) -> tuple[int, ...]:
    return stored[1], stored[0] * 32 // CODE_BITS[scheme.kind]


GPTQ = PublishedMethod(_read, _parts, lambda scheme: "qweight", _shape)
