"""Jobs and an endpoint whose model is split among processes: the answers of one process, and what becomes of a job
whose rank dies or hangs."""

import gc
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from engine_alone import answers
from hold import Hold
from http_calls import MODEL, call
from made_jobs import TINY, make_spec, read_output, write_input
from moray_run import MorayRun
from moray_serve import MorayServe
from rank_processes import ranks_below, watched_ranks
from served import served

from moray.batch.output.verify import verify
from moray.batch.runtime.driver import run_job
from moray.batch.spec import JobSpec
from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.kernels.cpu.isa import isas

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.skipif(not isas(), reason="no kernels on this CPU whose sums are the same in parts"),
]

Start = Callable[[JobSpec], MorayRun]
CHAT = [{"role": "user", "content": "CEMENT reversed is"}]
MAX_TOKENS, EXPERTS_PER_TOKEN = 12, 2
TWO = {"tensor_parallel": 2}
WHOLE_EXPERTS = {**TWO, "expert_parallel": True}
both_splits = pytest.mark.parametrize("split", [TWO, WHOLE_EXPERTS], ids=("slices", "whole experts"))


def spec_of(folder: Path, rows: int = 20, **sections: Any) -> JobSpec:
    write_input(folder / "in/a.parquet", {"prompt": [f"max({i}, {i % 7}, 12) =" for i in range(rows)]})
    sampling = {"max_tokens": MAX_TOKENS, "temperature": 1.0, "seed": 7, "ignore_eos": True}
    engine = {"max_num_seqs": 8} | sections.pop("engine", {})
    output = {"token_ids": True, "logprobs": 1}
    return make_spec(folder, sampling=sampling, engine=engine, output=output, **sections)


def expert_tokens(run: MorayRun) -> list[list[list[int]]]:
    """Return the tokens by [layer][expert] of each worker."""
    return [event["tokens"] for event in run.events() if event["event"] == "experts"]


@both_splits
def test_a_job_of_two_ranks_writes_the_answers_of_one(tmp_path: Path, start: Start, split: dict[str, Any]) -> None:
    with watched_ranks() as ranks:
        run = start(spec_of(tmp_path, engine=split))
        code, output = run.end()
        assert code == 0, output
    assert len(ranks) == 1 and verify(str(tmp_path / "out")).closes
    written = read_output(tmp_path)
    computed = sum(row["num_prompt_tokens"] + row["num_generated_tokens"] - 1 for row in written)
    (tokens,) = expert_tokens(run)
    assert [sum(layer) for layer in tokens] == [EXPERTS_PER_TOKEN * computed] * len(tokens), "each token counts once"
    report = (tmp_path / "out/_job/report.html").read_text()
    assert f"layer 0, expert 0: {tokens[0][0]:,} tokens" in report
    for path in (tmp_path / "out").glob("*.parquet"):
        path.unlink()
    alone = start(spec_of(tmp_path))
    code, output = alone.end()
    assert code == 0, output
    assert read_output(tmp_path) == written and len(written) == 20
    assert expert_tokens(alone) == [tokens], "the ranks chose the experts of one"


def test_one_rank_continues_what_two_have_begun(tmp_path: Path, one_cpu: None) -> None:
    assert run_job(spec_of(tmp_path, engine=WHOLE_EXPERTS)).exit_code == 0
    written = read_output(tmp_path)
    next(iter((tmp_path / "out").glob("*.parquet"))).unlink()
    with watched_ranks() as ranks:
        assert run_job(spec_of(tmp_path)).exit_code == 0
    assert not ranks and read_output(tmp_path) == written


def chat(url: str) -> tuple[int, str, list[float]]:
    body = {"model": MODEL, "messages": CHAT, "temperature": 0, "max_tokens": MAX_TOKENS, "logprobs": True}
    reply = call(f"{url}/v1/chat/completions", body)
    if reply.status != 200:
        return reply.status, "", []
    (choice,) = reply.json["choices"]
    return 200, choice["message"]["content"], [token["logprob"] for token in choice["logprobs"]["content"]]


def expected_chat() -> tuple[int, str, list[float]]:
    alone = Engine(str(TINY), EngineConfig(device="cpu", dtype="float32", num_threads=1))
    assert alone.tokenizer is not None
    params = SamplingParams(max_tokens=MAX_TOKENS, logprobs=0)
    (completion,) = answers(alone, [alone.tokenizer.encode_chat(CHAT)], params)
    assert completion.logprobs is not None
    return 200, alone.tokenizer.decode(completion.token_ids), [token.logprob for token in completion.logprobs]


@both_splits
def test_an_endpoint_of_two_ranks_answers_as_one(split: dict[str, Any]) -> None:
    with watched_ranks() as ranks:
        with served(**split) as local:
            assert chat(local.url) == expected_chat()
        del local
        gc.collect()
    assert len(ranks) == 1


def rows_of(folder: Path) -> Mapping[int, Any]:
    return {row["source_row"]: (row["generated_token_ids"], row["error"]) for row in read_output(folder)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, one_cpu: None) -> Mapping[int, Any]:
    """The rows of a job of one rank that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_job(spec_of(folder, rows=200)).exit_code == 0
    return rows_of(folder)


def signal_rank(run: MorayRun, hold: Hold, sent: signal.Signals) -> None:
    """Send a signal to the rank of a job that has two parts, and whose worker has more rows to run."""
    run.wait_for(lambda: len(run.parts()) >= 2 and hold.waiting("worker"))
    (worker,) = run.pids("worker")
    (rank,) = ranks_below(worker)
    os.kill(rank, sent)
    hold.release()


@pytest.mark.alone
@pytest.mark.parametrize(
    ("sent", "limits", "reason"),
    [
        (signal.SIGKILL, {}, r"EngineError: rank 1 of 2 \(process \d+\) was ended by SIGKILL; the engine has ended"),
        (signal.SIGSTOP, {"row_timeout_s": 10}, r"no step came back in 1\d s; limits.row_timeout_s is 10"),
    ],
    ids=("killed", "stopped"),
)
def test_a_job_goes_on_where_its_rank_fails(
    tmp_path: Path,
    hold: Hold,
    start: Start,
    undisturbed: Mapping[int, Any],
    sent: signal.Signals,
    limits: dict[str, float],
    reason: str,
) -> None:
    hold.at(2, "worker")
    run = start(spec_of(tmp_path, rows=200, engine=TWO, limits=limits))
    signal_rank(run, hold, sent)
    code, output = run.end()
    assert code == 0, output
    (lost,) = [event for event in run.events() if event["event"] == "actor_lost"]
    assert re.search(reason, lost["reason"]), lost
    assert verify(str(tmp_path / "out")).closes and rows_of(tmp_path) == undisturbed
    assert run.left() == []


@pytest.mark.alone
def test_moray_serve_replaces_a_replica_whose_rank_was_killed() -> None:
    endpoint = MorayServe("--set", "tensor_parallel=2", "--set", "expert_parallel=true", "--dtype", "float32")
    try:
        endpoint.wait_ready()
        assert chat(endpoint.url) == expected_chat()
        (replica,) = endpoint.replicas()
        (rank,) = ranks_below(replica)
        os.kill(rank, signal.SIGKILL)
        endpoint.wait_for(lambda: ask(endpoint.url) not in (None, 200))
        endpoint.wait_for(lambda: ask(endpoint.url) == 200)
        assert chat(endpoint.url) == expected_chat()
        assert endpoint.replicas() != [replica]
    finally:
        code, _ = endpoint.stop()
    assert code == 0 and not ranks_below(os.getpid())


def ask(url: str) -> int | None:
    """Return the status of an answer; None while nobody listens."""
    try:
        return chat(url)[0]
    except OSError:
        return None
