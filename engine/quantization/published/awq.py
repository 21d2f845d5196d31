"""AWQ in its version gemm, as AutoAWQ writes it: integers of 4 bits with zero points, packed along the outputs."""

from collections.abc import Mapping

from moray.engine.float_dtypes import STORED_FLOATS
from moray.engine.json_options import JsonOptions
from moray.engine.quantization.matrix_names import MatrixNames
from moray.engine.quantization.published.gptq import read_group_size
from moray.engine.quantization.published.method import PublishedMethod, num_groups
from moray.engine.quantization.published.names import containing
from moray.engine.quantization.scheme import CODE_BITS, Scheme
from moray.engine.quantization.stored_part import StoredPart

# How other programs run the weights: they change no weight.
HARMLESS = ("backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "meta")


def _read(options: JsonOptions, names: MatrixNames) -> Scheme:
    options.expect_only(
        *HARMLESS, "quant_method", "method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version",
        "format", "checkpoint_format", "modules_to_not_convert", "sym", "desc_act", "lm_head", "pack_dtype",
    )  # fmt: skip
    for key in ("bits", "w_bit"):
        options.expect(key, 4)
    for key in ("version", "format", "checkpoint_format"):
        if str(options.value(key) or "gemm").lower() != "gemm":
            options.refuse(options.describe(key), "gemm")
    if options.value("backend") == "llm-awq":
        options.refuse(options.describe("backend"), "autoawq, which packs weights in another order")
    options.expect("zero_point", True)
    for key in ("sym", "desc_act", "lm_head"):
        options.expect(key, False)
    options.expect("pack_dtype", "int32")
    values = {"group_size": options.one_of("group_size", "q_group_size")}
    group_size = read_group_size(JsonOptions(values, prefix=options.prefix, problems=options.problems), 128)
    return Scheme(
        "awq",
        "int4",
        group_size,
        symmetric=False,
        layout="awq",
        ignore=(
            names.embedding,
            names.router,
            names.head,
            *map(containing, options.texts("modules_to_not_convert")),
        ),
    )


def _parts(scheme: Scheme, shape: tuple[int, int]) -> Mapping[str, StoredPart]:
    (rows, inputs), groups = shape, num_groups(scheme, shape)
    words = -(-rows * CODE_BITS[scheme.kind] // 32)
    return {
        "qweight": StoredPart((inputs, words), ("I32",)),
        "qzeros": StoredPart((groups, words), ("I32",)),
        "scales": StoredPart((groups, rows), STORED_FLOATS),
    }


def _shape(scheme: Scheme, stored: tuple[int, ...]) -> tuple[int, ...]:
    return stored[1] * 32 // CODE_BITS[scheme.kind], stored[0]


AWQ = PublishedMethod(_read, _parts, lambda scheme: "qweight", _shape)
