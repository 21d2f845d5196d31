"""The answers of a job that nobody disturbed: an engine alone, without Ray and without a job."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq
from made_jobs import TINY

from moray.batch.stages.prepare import stream_key
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.request import Request


def answers(folder: Path, rows: Iterable[tuple[str, int]], params: SamplingParams) -> dict[tuple[str, int], str]:
    """What the rows (file, number) of the job's input are answered."""
    engine = Engine(str(TINY), EngineConfig(max_num_seqs=16))
    assert engine.tokenizer is not None
    keys = {}
    prompts = {path.name: pq.read_table(path)["prompt"].to_pylist() for path in (folder / "in").glob("*.parquet")}
    for file, row in rows:
        ids = engine.tokenizer.encode_prompt(prompts[file][row])
        keys[f"{file} {row}"] = file, row
        engine.add(Request(f"{file} {row}", ids, params, stream_key(params.seed, file, row)))
    found = {}
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                found[keys[output.request_id]] = engine.tokenizer.decode(output.completion.token_ids)
    return found
