"""A job's status in words."""

from dataclasses import replace

from moray.batch.ledger import State
from moray.batch.status.status import Status
from moray.jobs.views import status_text

RUNNING = Status(
    name="demo", run="r1", output="out/demo", state=State.RUNNING, reason=None, input_rows=1200, ok_rows=1000,
    failed_rows=2, pending_rows=198, rows_done=1010, shards=12, committed_shards=10, prompt_tokens=9000,
    generated_tokens=5000, prompt_tokens_per_s=2340.2, tokens_per_s=1234.5, elapsed_s=61.0, eta_s=9.4, eta_low_s=8.1,
    eta_high_s=12.4, workers=2, workers_starting=1, busy=0.978, kv_use=0.41, worker_s=7200.0, card_s=0.0,
    errors={"too_long": 2},
)  # fmt: skip
PENDING = replace(
    RUNNING,
    state=State.PENDING,
    rows_done=0,
    failed_rows=0,
    prompt_tokens_per_s=0.0,
    tokens_per_s=0.0,
    eta_s=None,
    workers=0,
    worker_s=4.0,
)
DONE = replace(
    RUNNING, state=State.SUCCEEDED, ok_rows=1198, pending_rows=0, rows_done=1200, eta_s=None, workers=0,
    workers_starting=0,
)  # fmt: skip
CANCELLED = replace(DONE, state=State.CANCELLED, reason="SIGINT", ok_rows=1000, pending_rows=198)


def test_a_line_has_everything() -> None:
    assert status_text.line(RUNNING, price=2.5) == (
        "demo: 1,010/1,200 rows, 2 failed (too_long 2), 2,340 tokens/s in, 1,234 out, 9.4 s left (8.1 s to 12 s), "
        "2 workers, 1 starting, 98% busy, KV cache 41%, $5.00 so far"
    )
    assert status_text.line(PENDING) == "demo: starting Ray, loading the model, 1 worker starting"


def test_what_max_tokens_cut_is_told() -> None:
    assert ", 1 row: structured output cut by max_tokens, " in status_text.line(replace(RUNNING, cut_rows=1))
    (told,) = [line for line in status_text.summary(replace(DONE, cut_rows=12)) if "cut" in line]
    assert told == (
        "  12 rows: structured output cut by max_tokens; raise sampling.max_tokens, or bound what may be written"
    )
    assert not [line for line in status_text.summary(DONE) if "cut" in line]


def test_workers_are_told_with_their_gpus() -> None:
    told = [status_text.work(replace(RUNNING, worker_gpus=gpus))[0] for gpus in (0, 0.5, 1.0, 4.0)]
    assert told == ["2 workers", "2 workers x 0.5 GPU", "2 workers x 1 GPU", "2 workers x 4 GPUs"]


def test_what_is_not_known_is_not_told() -> None:
    bare = replace(
        RUNNING, prompt_tokens_per_s=0.0, tokens_per_s=0.0, eta_s=None, workers=0, workers_starting=0, failed_rows=0
    )
    assert status_text.line(bare) == "demo: 1,010/1,200 rows"
    vague = replace(bare, eta_s=70.0, eta_low_s=None, tokens_per_s=3.0)
    assert status_text.pace(vague) == ["3 tokens/s out", "1 min 10 s left"]


def test_a_job_that_scores_tells_the_tokens_it_reads() -> None:
    scoring = replace(RUNNING, generated_tokens=0, tokens_per_s=2340.2, eta_s=None)
    assert status_text.pace(scoring) == ["2,340 tokens/s in"]
    done = replace(DONE, generated_tokens=0)
    assert status_text.summary(done)[2] == "  9,000 prompt tokens, 1,234 tokens/s, 1 min 01 s in all"


def test_a_job_that_is_being_stopped_says_so() -> None:
    assert status_text.pace(replace(RUNNING, reason="SIGINT")) == ["2,340 tokens/s in", "1,234 out", "stopping: SIGINT"]


def test_money_is_for_gpus_where_there_are_some() -> None:
    assert status_text.summary(DONE)[3] == "  output: out/demo"
    assert status_text.summary(DONE, price=0.1)[3] == "  2 worker-hours, $0.20"
    held = replace(DONE, card_s=8 * 7200.0)
    assert status_text.summary(held)[3] == "  16 GPU-hours"
    assert status_text.summary(held, price=3.0)[3] == "  16 GPU-hours, $48.00"


def test_a_job_that_is_not_done_says_how_to_continue() -> None:
    assert status_text.summary(CANCELLED) == [
        "demo CANCELLED: SIGINT",
        "  1,000 of 1,200 rows ok, 2 failed (too_long 2), 198 not done",
        "  5,000 tokens generated, 1,234 tokens/s, 1 min 01 s in all",
        "  output: out/demo",
        "  Run the same command again to continue.",
    ]


def test_a_job_with_too_many_failed_rows_says_what_ends_that() -> None:
    over = replace(
        CANCELLED, state=State.FAILED, reason="2 rows failed; limits.max_failed_rows is 1", max_failed_rows=1
    )
    assert status_text.summary(over)[4:] == ["  Raise limits.max_failed_rows, and run it again to continue."]
    done = replace(over, pending_rows=0, ok_rows=1198)
    assert status_text.summary(done)[4:] == [
        "  Raise limits.max_failed_rows, or run the failed rows again: `moray retry`."
    ]
    assert status_text.summary(replace(CANCELLED, max_failed_rows=2))[4:] == [
        "  Run the same command again to continue."
    ]


def test_a_job_whose_driver_died_says_why() -> None:
    status = replace(DONE, restarts=2, restart_reason="the driver was killed by SIGKILL")
    assert status_text.summary(status)[2].endswith("s since the last restart")
    restarts = "the driver was restarted 2 times, the last time because the driver was killed by SIGKILL"
    assert f"  {restarts}" in status_text.summary(status)
    assert status_text.line(replace(status, state=State.PENDING)).count(restarts) == 1
    assert not any("restarted" in line for line in status_text.summary(DONE))


def test_the_limits_of_a_step_are_told_and_that_they_were_lowered() -> None:
    known = replace(RUNNING, max_num_seqs=704, max_num_batched_tokens=2816)
    assert status_text.limits(RUNNING) == []
    assert status_text.limits(known) == ["at most 704 sequences and 2,816 tokens a step"]
    lowered = replace(known, max_num_batched_tokens=704, lowered_limits=2)
    assert status_text.limits(lowered)[1] == "lowered 2 times: memory ran out"
    (told,) = [line for line in status_text.summary(replace(lowered, state=State.SUCCEEDED)) if "lowered" in line]
    assert "at most 704 sequences and 704 tokens a step" in told and "engine.max_num_batched_tokens" in told
    assert not [line for line in status_text.summary(replace(known, state=State.SUCCEEDED)) if "a step" in line]
