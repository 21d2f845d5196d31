"""Collect a sample: read the chosen rows and run them through the steps of prepare."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, takewhile
from threading import Lock
from typing import Any

import pyarrow as pa
from pyarrow import fs

from moray.batch.forecast.sample import PromptSample, SampledPrompt
from moray.batch.forecast.sample_plan import SamplePlan
from moray.batch.input.columns import prompt_columns
from moray.batch.input.layout import Layout
from moray.batch.input.reader import ShardReader
from moray.batch.shards import Shard, Slice
from moray.batch.spec import JobSpec
from moray.batch.stages.block_schemas import Failure
from moray.batch.stages.continuations import Encoded
from moray.batch.stages.prepare import Prepare
from moray.batch.stages.prompts import Prompts
from moray.batch.stages.row_params import unpack_params
from moray.engine.config import ModelConfig
from moray.engine.text.tokenizer import Tokenizer

THREADS = 16  # files read at once from an object store, which answers many requests at once
LOCAL_THREADS = 2  # files read at once from a disk, where more cost memory and gain nothing


def collect_sample(
    sample_plan: SamplePlan,
    spec: JobSpec,
    filesystem: fs.FileSystem,
    root: str,
    layout: Layout,
    tokenizer: Tokenizer,
    config: ModelConfig,
) -> PromptSample:
    """Read and tokenize the rows of the plan with the same steps as prepare. Columns that are only kept are not read.

    Raises UserError where the input or the tokenizer has changed since the job was planned.
    """
    columns, longest = prompt_columns(spec), spec.model.max_model_len or config.max_position_embeddings
    prompts = _Recorder(spec, tokenizer, config.vocab_size)

    def prepare(runs: list[tuple[Slice, ...]]) -> list[tuple[SampledPrompt, ...]]:
        """Prepare the runs of one file, in order."""
        reader = ShardReader(filesystem, root, columns, pa.schema([]), layout)
        stage = Prepare(spec, reader, prompts, pa.schema([]), longest)
        return [tuple(_rows(stage.block(Shard(0, run), ""))) for run in runs]

    by_file = [list(runs) for _, runs in groupby(sample_plan.runs, key=lambda run: run[0].file)]
    threads = LOCAL_THREADS if isinstance(filesystem, fs.LocalFileSystem) else THREADS
    with ThreadPoolExecutor(threads) as pool:
        runs = tuple(run for found in pool.map(prepare, by_file) for run in found)
    facts = prompts.duplicates(), prompts.shared_prefix(), prompts.double_bos()
    return PromptSample(sample_plan.input_rows, runs, sample_plan.scanned_fraction, *facts)


class _Recorder(Prompts):
    """Encodes prompts and records their tokens. Threads encode one at a time: tokenizers are not thread-safe."""

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, vocab_size: int) -> None:
        super().__init__(spec, tokenizer, vocab_size)
        self._bos_id = tokenizer.bos_id if spec.input.kind == "prompt" else None
        self._lock = Lock()
        self._seen: list[tuple[Any, ...]] = []

    def encode(self, table: pa.Table) -> list[Encoded | Failure]:
        with self._lock:
            encoded = super().encode(table)
            good = [item for item in encoded if not isinstance(item, Failure)]
            self._seen += [(tuple(prompt), *map(tuple, continuations)) for prompt, continuations in good]
            return encoded

    def duplicates(self) -> int:
        """Return how many rows have the prompt and continuations of an earlier row."""
        return len(self._seen) - len(set(self._seen))

    def double_bos(self) -> int:
        """Return how many prompts begin with two beginning-of-sequence tokens."""
        return sum(1 for prompt, *_ in self._seen if self._bos_id is not None and prompt[:2] == (self._bos_id,) * 2)

    def shared_prefix(self) -> int:
        """Return how many tokens all prompts begin with; 0 where there are no two different prompts."""
        prompts = {seen[0] for seen in self._seen}
        if len(prompts) < 2:
            return 0
        both = zip(min(prompts), max(prompts), strict=False)  # what the first and last in order share, all share
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))


def _rows(block: pa.Table) -> Iterator[SampledPrompt]:
    names = ("num_prompt_tokens", "continuations", "error")
    columns = zip(*(block[name].to_pylist() for name in names), unpack_params(block), strict=True)
    for tokens, continuations, error, params in columns:
        if params is None:
            yield SampledPrompt(tokens, error=error["code"])
            continue
        scored = [len(ids) for ids in continuations or ()]
        max_tokens = params.max_tokens
        is_fixed = params.ignore_eos and not params.stop and not params.stop_token_ids
        yield SampledPrompt(
            prompt_tokens=tokens,
            prefill_tokens=tokens + sum(scored),
            min_generated=(max_tokens if is_fixed else params.min_tokens) * params.n,
            max_generated=max_tokens * params.n,
            sequence_tokens=tokens + max(scored, default=max_tokens),
        )
