"""Quantized weights in whole jobs and at the endpoint: the engine's own answers, and which format gave them."""

import json
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from engine_alone import answers
from http_calls import MODEL, call
from made_jobs import TINY, make_spec, read_output, write_input
from moray_run import MORAY
from moray_serve import MorayServe
from patience import PATIENCE_S
from served import served

from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import read_plan
from moray.batch.output.verify import verify
from moray.batch.runtime.driver import JobResult, run_job
from moray.batch.spec import JobSpec
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.errors import OutputError
from moray.engine.params import SamplingParams
from moray.engine.request import Completion

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_cpu"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
PROMPTS = [f"max({i}, {i + 7}, 12) =" for i in range(12)] + ["zebra, turtle, sheep, onion sorted:"]
CHAT = [{"role": "user", "content": "CEMENT reversed is"}]
MAX_TOKENS = 12
PARAMS = SamplingParams(max_tokens=MAX_TOKENS, logprobs=0)

Answer = tuple[list[int], list[float]]  # tokens and their logprobs


@cache
def engine(quantization: Any, kv_cache_dtype: Any = None) -> Engine:
    config = EngineConfig(quantization=quantization, kv_cache_dtype=kv_cache_dtype, num_threads=1)
    return Engine(str(TINY), config)


def as_answer(completion: Completion) -> Answer:
    assert completion.logprobs is not None
    return list(completion.token_ids), [token.logprob for token in completion.logprobs]


def expected(quantization: Any, kv_cache_dtype: Any = None) -> list[Answer]:
    alone = engine(quantization, kv_cache_dtype)
    assert alone.tokenizer is not None
    prompts = [alone.tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    return [as_answer(completion) for completion in answers(alone, prompts, PARAMS)]


def spec_of(folder: Path, kv_cache_dtype: str = "auto", **model: Any) -> JobSpec:
    write_input(folder / "in/a.parquet", {"prompt": PROMPTS})
    output = {"token_ids": True, "logprobs": 0}
    engine = {"kv_cache_dtype": kv_cache_dtype}
    return make_spec(folder, model=model, sampling={"max_tokens": MAX_TOKENS}, output=output, engine=engine)


def written(folder: Path) -> list[Answer]:
    """The answers of a job, of which every row is known to be there once."""
    assert verify(str(folder / "out")).closes
    return [
        (row["generated_token_ids"], [token["logprob"] for token in row["logprobs"]]) for row in read_output(folder)
    ]


def origins(folder: Path) -> list[tuple[str, str | None]]:
    """The version of moray and the format of the weights, as each part has them."""
    records = [json.loads(pq.read_metadata(part).metadata[b"moray"]) for part in (folder / "out").glob("*.parquet")]
    assert records
    return sorted({(record["moray"], record["quantization"]) for record in records})


def components(folder: Path) -> dict[str, Any]:
    return dict(read_plan(OutputFolder(str(folder / "out"))).fingerprint.others)


@pytest.fixture(scope="module")
def int8_job(tmp_path_factory: pytest.TempPathFactory, one_cpu: None) -> Iterator[tuple[Path, JobResult]]:
    folder = tmp_path_factory.mktemp("int8")
    yield folder, run_job(spec_of(folder, quantization="int8"))


def test_answers_are_those_of_an_engine_alone(int8_job: tuple[Path, JobResult]) -> None:
    folder, _ = int8_job
    assert written(folder) == expected("int8") != expected(None)


def test_answers_in_four_bits_are_those_of_an_engine_alone(tmp_path: Path) -> None:
    assert run_job(spec_of(tmp_path, quantization="int4")).exit_code == 0
    assert written(tmp_path) == expected("int4") != expected("int8")


def test_a_cache_in_fp8_changes_answers_and_the_fingerprint(tmp_path: Path) -> None:
    assert run_job(spec_of(tmp_path, "fp8")).exit_code == 0
    assert written(tmp_path) == expected(None, "fp8") != expected(None)
    assert components(tmp_path)["engine.kv_cache_dtype"] == "fp8/1"
    with pytest.raises(OutputError, match=r"engine\.kv_cache_dtype: fp8/1 -> null"):
        run_job(spec_of(tmp_path, "model"))


def test_parts_and_the_fingerprint_have_the_format(int8_job: tuple[Path, JobResult]) -> None:
    folder, _ = int8_job
    assert components(folder)["model.quantization"] == "int8/1"
    assert origins(folder) == [(version("moray"), "int8/1")]


def test_another_format_is_refused_and_the_same_continues(int8_job: tuple[Path, JobResult]) -> None:
    folder, first = int8_job
    before = written(folder)
    for other, shown in (("int4", "int4/1"), ("fp8", "fp8/1"), (None, "null")):
        with pytest.raises(OutputError) as refusal:
            run_job(spec_of(folder, quantization=other))
        assert str(refusal.value) == (
            f"{folder}/out holds the output of another job. Give this one a folder of its own, or undo what "
            f"changed:\n  model.quantization: int8/1 -> {shown}"
        )
    next(iter((folder / "out").glob("*.parquet"))).unlink()
    again = run_job(spec_of(folder, quantization="int8"))
    assert (first.exit_code, again.exit_code, again.did_nothing) == (0, 0, False)
    assert written(folder) == before


def test_a_checkpoint_that_moray_quantize_has_written(int8_job: tuple[Path, JobResult], tmp_path: Path) -> None:
    folder, _ = int8_job
    command = [MORAY, "quantize", str(TINY), str(tmp_path / "model"), "--format", "int8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert run_job(spec_of(tmp_path, path=str(tmp_path / "model"))).exit_code == 0
    assert written(tmp_path) == expected("int8")
    assert origins(tmp_path) == [(version("moray"), "compressed-tensors int8")]
    new, old = components(tmp_path), components(folder)
    assert {name for name in new if new[name] != old[name]} == {"model.files", "model.quantization"}


def chat_answer(url: str) -> tuple[str, list[float]]:
    body = {"model": MODEL, "messages": CHAT, "temperature": 0, "max_tokens": MAX_TOKENS, "logprobs": True}
    reply = call(f"{url}/v1/chat/completions", body)
    assert reply.status == 200, reply.text
    (choice,) = reply.json["choices"]
    return choice["message"]["content"], [token["logprob"] for token in choice["logprobs"]["content"]]


def expected_chat(quantization: str) -> tuple[str, list[float]]:
    alone = engine(quantization)
    assert alone.tokenizer is not None
    (completion,) = answers(alone, [alone.tokenizer.encode_chat(CHAT)], PARAMS)
    tokens, logprobs = as_answer(completion)
    return alone.tokenizer.decode(tokens), logprobs


def test_the_endpoint_answers_a_chat() -> None:
    for quantization in ("int8", "int4"):
        with served(dtype="auto", quantization=quantization) as local:
            assert chat_answer(local.url) == expected_chat(quantization)
    assert expected_chat("int8") != expected_chat("int4")


def test_moray_serve_answers_a_chat() -> None:
    endpoint = MorayServe("--set", "quantization=int8")
    try:
        endpoint.wait_ready()
        assert chat_answer(endpoint.url) == expected_chat("int8")
    finally:
        code, _ = endpoint.stop()
    assert code == 0
