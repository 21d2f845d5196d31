"""Models with quantized weights: their logits against those of a model in fp32 whose weights are the numbers that the
codes stand for, and the engine on them against itself."""

import importlib
from array import array
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from gpu.checks_engine import LAYERS, batches, eager, generate_together, make_engine
from gpu.checks_kernels import Check, differing, run_checks
from gpu.model_formats import kind_of, model_formats, with_format
from gpu.models import NAMES, dequantized_model, folder, random_model
from gpu.ours import Ours
from gpu.setup import Row, Setup
from moray.engine.backends.base import Backend
from moray.engine.backends.choose import choose_backend
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.quantization import with_quantization
from moray.engine.config import ModelConfig
from moray.engine.core.scheduler import Scheduled
from moray.engine.core.sequence import Sequence
from moray.engine.models.base import CausalLM
from moray.engine.params import SamplingParams
from moray.engine.request import Request
from moray.engine.runner.model_runner import ModelRunner

ROWS = (1, 32, 256)
DRY_ROWS = (1, 6)
BLOCK_SIZE = 16
# ||logits - reference|| / ||reference|| of the median row: a few rows have other experts after any rounding. In bf16
# the model rounds at some twenty places; rows in fp8 are rounded to 4 bits at every product.
LIMIT, FP8_LIMIT = 0.03, 0.25

Load = Callable[..., CausalLM]


def run(setup: Setup) -> Iterator[Row]:
    yield from run_checks(setup, _checks(setup))


def _checks(setup: Setup) -> Iterator[Check]:
    model = NAMES[0]
    for name in model_formats(is_dry=setup.is_dry):
        logits = cache(partial(_logits, name, setup))
        limit = FP8_LIMIT if name == "fp8_fp8" else LIMIT
        yield f"{model} {name}: logits unlike fp32 ones", partial(_error, logits, name, setup), limit
        if setup.is_dry:  # the interpreter's sums depend on a row's place, and a CPU has no graphs
            continue
        for rows in ROWS[:-1]:
            yield f"{model} {name}: {rows} rows alone equal the same of {ROWS[-1]}", partial(_prefix, logits, rows), 0
        logits.cache_clear()
        engines = partial(make_engine, Ours(model, layers=LAYERS, weights=name))
        together = cache(partial(generate_together, engines, setup))
        yield f"{model} {name}: graphs equal eager steps", partial(eager, engines, setup, together), 0
        yield f"{model} {name}: the same in batches of 7", partial(batches, engines, setup, together, 7), 0


def _error(logits: Callable[[int], Tensor], name: str, setup: Setup) -> float:
    rows = (DRY_ROWS if setup.is_dry else ROWS)[-1]
    found = logits(rows).double()
    config = _config(name, setup)
    wanted = _run(dequantized_model, config, torch.float32, _backend(setup), rows).double()
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).median())


def _prefix(logits: Callable[[int], Tensor], rows: int) -> float:
    """Return the share of rows that differ bit by bit when the prompt ends with them."""
    return differing(logits(rows), logits(ROWS[-1])[:rows])


def _logits(name: str, setup: Setup, rows: int) -> Tensor:
    backend = with_format(_backend(setup), name)
    return _run(random_model, _config(name, setup), torch.bfloat16, backend, rows)


def _config(name: str, setup: Setup) -> ModelConfig:
    path = folder(NAMES[0], None if setup.is_dry else LAYERS, is_tiny=setup.is_dry)
    return with_quantization(read_model_config(path), kind_of(name), str(path))


def _backend(setup: Setup) -> Backend:
    if setup.is_dry:
        backend: Backend = importlib.import_module("triton_backend").TRITON  # of the tests: on the CPU
        return backend
    return choose_backend("cuda")


def _unit(tensor: Tensor) -> None:
    """Fill a tensor so that a product with it keeps the size of its inputs, and no layer is lost beside another."""
    tensor.normal_(std=tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.1)


def _run(load: Load, config: ModelConfig, dtype: torch.dtype, backend: Backend, rows: int) -> Tensor:
    """Return the logits of a prompt's first rows, [rows, vocab_size] fp32 in the host's memory."""
    model = load(folder(NAMES[0]), config, dtype, backend, _unit)
    runner = ModelRunner(model, config, dtype, block_size=BLOCK_SIZE, backend=backend)
    blocks = -(-rows // BLOCK_SIZE)
    runner.allocate_cache(blocks)
    prompt = torch.randint(3, config.vocab_size, (ROWS[-1],), generator=torch.Generator().manual_seed(0)).tolist()
    seq = Sequence(0, Request("r", prompt[:rows], SamplingParams()))
    seq.rope_set, seq.block_table = 0, array("i", range(blocks))
    return runner.compute_logits(runner.run([Scheduled(seq, rows)]), range(rows)).float().cpu()
