"""lm-evaluation-harness, unchanged, against the endpoint: the small model's held-out questions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from made_jobs import TINY
from patience import PATIENCE_S
from served import Served

from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request

HELD_OUT = TINY.parent / "heldout.parquet"
NUM_ROWS = 60
TASK = """\
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: {target}
{more}
"""
ANSWERS = """\
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, temperature: 0}
filter_list:
  - name: stripped
    filter: [{function: regex, regex_pattern: "^\\\\s*(.*?)\\\\s*$"}, {function: take_first}]
metric_list: [{metric: exact_match}]
"""
CHOICES = """\
doc_to_choice: ["10", "20", "100"]
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    table = pq.read_table(HELD_OUT)
    step = table.num_rows // NUM_ROWS
    return table.take(list(range(0, table.num_rows, step))[:NUM_ROWS]).to_pylist()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(str(TINY), EngineConfig(dtype="float32", num_threads=1))


def lm_eval(folder: Path, rows: list[dict[str, Any]], task: str, *arguments: str) -> dict[str, Any]:
    """Run one task; returns its results, with the samples under "samples"."""
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    (folder / "task.yaml").write_text(task)
    command = [
        sys.executable, "-m", "lm_eval", "run", "--tasks", "heldout", "--include_path", str(folder),
        "--output_path", str(folder / "out"), "--log_samples", *arguments,
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OPENAI_API_KEY": "x"}
    done = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    found: dict[str, Any] = json.loads(results.read_text())["results"]["heldout"]
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return found | {"samples": sorted(lines, key=lambda line: line["doc_id"])}


def run(engine: Engine, prompts: list[list[int]], **params: Any) -> list[Completion]:
    """Return the scores of the engine alone, which a batch job writes too."""
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), prompt, SamplingParams(**params)))
    done: dict[int, Completion] = {}
    while engine.has_work:
        done |= {int(o.request_id): o.completion for o in engine.step() if o.completion is not None}
    return [done[index] for index in range(len(prompts))]


def model(local: Served, kind: str, path: str) -> list[str]:
    arguments = f"model=tiny-phimoe,base_url={local.url}{path},num_concurrent=8,max_retries=1"
    if kind == "local-completions":
        arguments += f",tokenizer_backend=huggingface,tokenizer={TINY}"
    return ["--model", kind, "--model_args", arguments]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_generation(local: Served, engine: Engine, rows: list[dict[str, Any]], tmp_path: Path, kind: str) -> None:
    assert engine.tokenizer is not None
    task = TASK.format(
        name="heldout", file=tmp_path / "rows.parquet", kind="generate_until", target="'{{expected}}'", more=ANSWERS
    )
    if kind == "local-completions":
        given = model(local, kind, "/v1/completions")
        prompts = [engine.tokenizer.encode_prompt(row["prompt"]) for row in rows]
    else:
        given = [*model(local, kind, "/v1/chat/completions"), "--apply_chat_template"]
        prompts = [engine.tokenizer.encode_chat([{"role": "user", "content": row["prompt"]}]) for row in rows]
    found = lm_eval(tmp_path, rows, task, *given)
    own = [engine.tokenizer.decode(done.token_ids) for done in run(engine, prompts, max_tokens=24)]
    assert [sample["resps"][0][0] for sample in found["samples"]] == own
    right = sum(text.strip() == row["expected"] for text, row in zip(own, rows, strict=True))
    assert found["exact_match,stripped"] == pytest.approx(right / len(rows))
    assert kind == "local-chat-completions" or right > 0.9 * len(rows)


@pytest.mark.slow
def test_scoring(local: Served, engine: Engine, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert engine.tokenizer is not None
    task = TASK.format(name="heldout", file=tmp_path / "rows.parquet", kind="multiple_choice", target="0", more=CHOICES)
    found = lm_eval(tmp_path, rows, task, *model(local, "local-completions", "/v1/completions"))
    for row, sample in zip(rows, found["samples"], strict=True):
        contexts = [engine.tokenizer.encode_prompt(row["prompt"])] * 3
        whole = [engine.tokenizer.encode_prompt(f"{row['prompt']} {choice}") for choice in ("10", "20", "100")]
        for context, ids, done, response in zip(
            contexts, whole, run(engine, whole, max_tokens=1, prompt_logprobs=1), sample["resps"], strict=True
        ):
            assert done.prompt_logprobs is not None
            entries = [entry for entry in done.prompt_logprobs[len(context) :] if entry is not None]
            assert ids[: len(context)] == context
            assert float(response[0][0]) == pytest.approx(sum(entry.logprob for entry in entries), rel=1e-5)
            is_greedy = all(entry.logprob == entry.top[0][1] for entry in entries)
            assert response[0][1] in (is_greedy, str(is_greedy))
