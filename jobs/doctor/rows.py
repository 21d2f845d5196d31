"""Check determinism: a row of a linear layer has the same bits whatever other rows are in the batch."""

from collections.abc import Iterator
from pathlib import Path

from moray.engine.config import ModelConfig
from moray.engine.errors import CheckpointError, NodeError
from moray.engine.platform.cpus import available_cores
from moray.jobs.doctor.finding import Finding, Subject, ok, problem, warning

SMALL_MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-phimoe"
# [out_features, in_features] of common models, at which libraries were seen to change their algorithm.
TYPICAL = ((3200, 1024), (1024, 3200))
BATCH_SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127)  # compared with MAX_BATCH_SIZE rows
MAX_BATCH_SIZE = 130


def same_rows(subject: Subject) -> Iterator[Finding]:
    """Check the shapes of the given model, else those of the small model and some common ones.

    The engine's own check chooses each shape's path; this check tests the path again with other numbers of rows and of
    cores.
    """
    shapes, dtypes = _shapes(subject)
    mistakes: list[str] = []
    rejected: list[str] = []
    used: dict[str, dict[str, None]] = {}
    for dtype in dtypes:
        for shape in shapes:
            path, failed = _choose_path(shape, dtype)
            used.setdefault(dtype, {})[path] = None
            rejected += [f"{list(shape)} in {dtype} on {one}" for one in failed]
            mistakes += _compare(shape, dtype, path)
    for mistake in mistakes:
        yield problem(mistake, "set model.dtype=float32 if that is not listed here; report the processor")
    if rejected:
        fix = "nothing to do: slower paths are used instead; please report the processor"
        yield warning(f"these are not deterministic on this processor: {', '.join(rejected)}", fix)
    if not mistakes:
        paths = ", ".join(f"{dtype} by {' and '.join(names)}" for dtype, names in used.items())
        yield ok(f"same bits alone and in a batch in {len(shapes)} shapes of linear layers: {paths}")


def linear_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Return [out_features, in_features] of each kind of linear layer of a model."""
    heads, key_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden = config.hidden_size
    inners = config.intermediate_size, config.dense_intermediate_size, config.shared_intermediate_size
    shapes = [
        (heads + 2 * key_heads, hidden),
        (hidden, heads),
        (config.num_experts, hidden),
        *((inner, hidden) for inner in inners if inner),
        *((hidden, inner) for inner in inners if inner),
        (config.vocab_size, hidden),
    ]
    return list(dict.fromkeys(shapes))


def _shapes(subject: Subject) -> tuple[list[tuple[int, int]], tuple[str, ...]]:
    from moray.batch.plan.model_info import read_config
    from moray.engine.checkpoint.model_source import ModelSource

    if subject.model is not None:
        try:
            config = read_config(ModelSource(subject.model))
        except (CheckpointError, NodeError):  # the check of the model reports it
            pass
        else:
            dtype = "auto" if subject.spec is None else subject.spec.model.dtype
            return linear_shapes(config), (config.dtype if dtype == "auto" else dtype,)
    small = linear_shapes(read_config(ModelSource(str(SMALL_MODEL)))) if SMALL_MODEL.is_dir() else []
    return [*small, *TYPICAL], ("bfloat16", "float32")


def _choose_path(shape: tuple[int, int], dtype: str) -> tuple[str, tuple[str, ...]]:
    """Return the path that the engine would use, and faster ones that fail. Results of earlier runs are not used."""
    import torch

    from moray.kernels.cpu import self_check

    self_check.keep_results_in(None)
    found = self_check.check(*shape, getattr(torch, dtype))
    return found.path, found.failed_paths


def _compare(shape: tuple[int, int], dtype: str, path: str) -> Iterator[str]:
    """Yield the mistakes of a path: rows alone and in a batch, on all cores and on one, as the engine's check does."""
    import torch

    from moray.kernels.cpu.linear_mistakes import find_mistakes, make_weight
    from moray.kernels.cpu.thread_pool import use_cores

    with torch.inference_mode(), use_cores(available_cores()):
        weight = make_weight(*shape, getattr(torch, dtype))
        for mistake in find_mistakes(weight, path, num_rows=(*BATCH_SIZES, MAX_BATCH_SIZE), core_counts=(1,)):
            yield f"{list(shape)} in {dtype} by {path} has {mistake}"
