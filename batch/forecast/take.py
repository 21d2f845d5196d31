"""Take a sample: read the rows that were drawn, and find out what prepare makes of them."""

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, takewhile
from threading import Lock
from typing import Any

import pyarrow as pa
from pyarrow import fs

from batch.forecast.draw import Draw
from batch.forecast.sample import Sample, SampledRow
from batch.input.columns import prompt_columns
from batch.input.reader import ShardReader
from batch.planning.plan import Shard, Slice
from batch.spec import JobSpec
from batch.stages.continuations import Encoded
from batch.stages.prepare import Prepare
from batch.stages.prompts import Prompts
from batch.stages.rows import Failure
from engine.config import ModelConfig
from engine.tokenizer import Tokenizer

THREADS = 16  # an object store answers many at once; a disk is not worth the memory
LOCAL_THREADS = 2


def take_sample(
    draw: Draw, spec: JobSpec, filesystem: fs.FileSystem, root: str, tokenizer: Tokenizer, config: ModelConfig
) -> Sample:
    """Read and tokenize the rows of the draw, by the same steps as prepare; columns that are only kept are not read.

    Raises UserError where the input or the tokenizer is not what it was when the job was planned.
    """
    columns, longest = prompt_columns(spec), spec.model.max_model_len or config.max_position_embeddings
    prompts = _Recorder(spec, tokenizer, config.vocab_size)

    def prepare(runs: list[tuple[Slice, ...]]) -> list[tuple[SampledRow, ...]]:
        """Runs of one file, in order."""
        stage = Prepare(spec, ShardReader(filesystem, root, columns, pa.schema([])), prompts, pa.schema([]), longest)
        return [tuple(_rows(stage.block(Shard(0, run), ""))) for run in runs]

    by_file = [list(runs) for _, runs in groupby(draw.runs, key=lambda run: run[0].file)]
    threads = LOCAL_THREADS if isinstance(filesystem, fs.LocalFileSystem) else THREADS
    with ThreadPoolExecutor(threads) as pool:
        taken = tuple(run for found in pool.map(prepare, by_file) for run in found)
    return Sample(draw.input_rows, taken, draw.reach, prompts.duplicates(), prompts.shared_prefix())


class _Recorder(Prompts):
    """For several threads, one at a time (tokenizers are not made for more); remembers what it encoded."""

    def __init__(self, spec: JobSpec, tokenizer: Tokenizer, vocab_size: int) -> None:
        super().__init__(spec, tokenizer, vocab_size)
        self._lock = Lock()
        self._seen: list[tuple[Any, ...]] = []

    def encode(self, table: pa.Table) -> list[Encoded | Failure]:
        with self._lock:
            encoded = super().encode(table)
            good = [item for item in encoded if not isinstance(item, Failure)]
            self._seen += [(tuple(prompt), *map(tuple, continuations)) for prompt, continuations in good]
            return encoded

    def duplicates(self) -> int:
        return len(self._seen) - len(set(self._seen))

    def shared_prefix(self) -> int:
        """Tokens; 0 where there are no two different prompts."""
        prompts = {seen[0] for seen in self._seen}
        if len(prompts) < 2:
            return 0
        both = zip(min(prompts), max(prompts), strict=False)  # what these share, all between them do
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))


def _rows(block: pa.Table) -> Iterator[SampledRow]:
    names = ("num_prompt_tokens", "continuations", "params", "error")
    for tokens, continuations, pickled, error in zip(*(block[name].to_pylist() for name in names), strict=True):
        if error is not None:
            yield SampledRow(tokens, error=error["code"])
            continue
        params = pickle.loads(pickled)
        scored = [len(ids) for ids in continuations or ()]
        most = params.max_tokens
        is_fixed = params.ignore_eos and not params.stop and not params.stop_token_ids
        yield SampledRow(
            prompt_tokens=tokens,
            counted=tokens + sum(scored),
            least=(most if is_fixed else params.min_tokens) * params.n,
            most=most * params.n,
            sequence=tokens + max(scored, default=most),
        )
