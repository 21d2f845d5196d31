"""Batches of a store with replicas that have no model: what is run, what is written, and what a crash costs."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from made_batches import OWNER, Echo, MadeStore, line

from moray.batch.output.verify import verify
from moray.batch.report import make_report
from moray.batch.status.status import read_status
from moray.engine.errors import JobError
from moray.jobs.batches import run as run_module
from moray.jobs.batches.budget import RowBudget
from moray.jobs.batches.export import write_output_files
from moray.jobs.batches.job import BatchJob
from moray.jobs.batches.record import BatchRecord, BatchStatus
from moray.jobs.batches.sweep import sweep

DAY_S = 24 * 3600


def is_over(made: MadeStore, *batches: BatchRecord) -> bool:
    return all(made.batch(one).status.is_final for one in batches) and not made.store.folder.names("open")


def test_a_batch_becomes_a_job_folder(tmp_path: Path) -> None:
    made = MadeStore(tmp_path / "store")
    lines = [line(number, **({"refused": 1} if number % 7 == 3 else {})) for number in range(100)]
    batch = made.add_batch(lines)
    replica = Echo()
    asyncio.run(made.until(made.coordinator(replica), lambda: is_over(made, batch)))
    done = made.batch(batch)
    assert (done.status, done.total, done.completed, done.failed) == (BatchStatus.COMPLETED, 100, 86, 14)
    assert (done.input_tokens, done.output_tokens) == (3 * 86, 2 * 86)
    answered, refused = made.lines(done.output_file_id), made.lines(done.error_file_id)
    assert list(answered) == [f"c{number}" for number in range(100) if number % 7 != 3]  # in the order of the input
    assert len(refused) == 14 and refused["c3"]["response"]["status_code"] == 400
    assert answered["c5"]["response"]["body"] == {"echo": "5", "seed": f"{batch.id} 6"}
    assert set(replica.asked.values()) == {1}
    job = made.store.job(batch.id)
    found = verify(job.path)
    assert found.closes and (found.ok, found.failed, found.errors) == (86, 14, {"refused": 14})
    status = read_status(job)
    assert status is not None and (status[0].state, status[0].failed_rows) == ("SUCCEEDED", 14)
    assert batch.id in make_report(job.path)


def test_lines_in_flight_stay_few_and_batches_take_turns(tmp_path: Path) -> None:
    made = MadeStore(tmp_path / "store")
    large, small = made.add_batch([line(number) for number in range(400)]), made.add_batch([line(5000)])
    replica = Echo(max_rows=16)

    def is_small_over() -> bool:
        return made.batch(small).status.is_final

    async def both() -> None:
        coordinator = made.coordinator(replica, target=16)
        await made.until(coordinator, is_small_over)

    asyncio.run(both())
    assert made.batch(large).completed < 400
    asyncio.run(made.until(made.coordinator(replica), lambda: is_over(made, large, small)))
    assert replica.most_at_once <= 32 + 8


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_every_line_is_answered_once(tmp_path: Path, seed: int) -> None:
    """Each coordinator is ended at a random moment; the next one goes on where the store says."""
    generator = random.Random(seed)
    made = MadeStore(tmp_path / "store")
    batches = [made.add_batch([line(number) for number in range(first, first + 60)]) for first in (0, 100)]
    for _ in range(6):
        replica = Echo()
        replica.gate.clear()
        replica.num_before_gate = generator.randrange(0, 50)
        before = [made.batch(one) for one in batches]
        rows_before = _committed(made, batches)
        ticks = iter(range(generator.randrange(1, 40)))
        asyncio.run(made.until(made.coordinator(replica), lambda ticks=ticks: next(ticks, None) is None))
        assert replica.asked.keys().isdisjoint(rows_before), "a committed line was run again"
        assert rows_before <= _committed(made, batches)
        for old, one in zip(before, batches, strict=True):
            assert made.batch(one).completed >= old.completed, "the counts went back"
    asyncio.run(made.until(made.coordinator(Echo()), lambda: is_over(made, *batches)))
    for first, one in zip((0, 100), batches, strict=True):
        done = made.batch(one)
        assert (done.status, done.completed) == (BatchStatus.COMPLETED, 60)
        assert list(made.lines(done.output_file_id)) == [f"c{number}" for number in range(first, first + 60)]
        assert verify(made.store.job(one.id).path).closes


def _committed(made: MadeStore, batches: list[BatchRecord]) -> set[str]:
    """The prompts of the lines that have a part."""
    parts = [path for one in batches for path in Path(made.store.job(one.id).root).glob("*.parquet")]
    return {name.removeprefix("c") for path in parts for name in pq.read_table(path)["custom_id"].to_pylist()}


def test_a_line_that_ends_its_replica_costs_no_other(tmp_path: Path) -> None:
    made = MadeStore(tmp_path / "store")
    batch = made.add_batch([line(number) for number in range(40)])
    replica = Echo(poison=["13", "14"])
    asyncio.run(made.until(made.coordinator(replica), lambda: is_over(made, batch)))
    done = made.batch(batch)
    assert (done.status, done.completed, done.failed) == (BatchStatus.COMPLETED, 38, 2)
    errors = made.lines(done.error_file_id)
    assert errors.keys() == {"c13", "c14"}
    response = errors["c13"]["response"]
    assert (response["status_code"], response["body"]["error"]["code"]) == (500, "killed_worker")
    assert replica.asked["13"] < 10


def test_replicas_that_always_die_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "UNFIT_PAUSE_S", 0.0)
    made = MadeStore(tmp_path / "store")
    batch = made.add_batch([line(number) for number in range(16)])
    replica = Echo(poison=[str(number) for number in range(16)])

    async def heal() -> None:
        coordinator = made.coordinator(replica)

        def has_healed() -> bool:
            if sum(replica.asked.values()) > 150:
                replica._poison.clear()
            return is_over(made, batch)

        await made.until(coordinator, has_healed)

    asyncio.run(heal())
    done = made.batch(batch)
    assert done.completed + done.failed == 16 and done.status is BatchStatus.COMPLETED


def test_expiry_keeps_what_is_done(tmp_path: Path) -> None:
    made = MadeStore(tmp_path / "store", drain_s=0.05)
    batch = made.add_batch([line(number) for number in range(80)], window_s=3600)
    replica = Echo()
    replica.gate.clear()
    replica.num_before_gate = 16

    def expire() -> bool:
        if made.batch(batch).completed == 16:
            made.now_s += 3600
        return is_over(made, batch)

    asyncio.run(made.until(made.coordinator(replica, target=16), expire))
    done = made.batch(batch)
    assert (done.status, done.completed, done.failed) == (BatchStatus.EXPIRED, 16, 64)
    assert len(made.lines(done.output_file_id)) == 16
    errors = made.lines(done.error_file_id)
    assert len(errors) == 64
    message = "This request could not be executed before the completion window expired."
    assert errors["c79"]["response"] is None and errors["c79"]["error"] == {"code": "batch_expired", "message": message}
    # A coordinator that finds it expired after a crash runs nothing more.
    late = made.add_batch([line(number) for number in range(8)], window_s=3600)
    asyncio.run(made.until(made.coordinator(replica), lambda: made.batch(late).status is BatchStatus.IN_PROGRESS))
    made.now_s += 3600
    idle = Echo()
    asyncio.run(made.until(made.coordinator(idle), lambda: is_over(made, late)))
    assert made.batch(late).status is BatchStatus.EXPIRED and not idle.asked


def test_cancelled_before_it_was_checked(tmp_path: Path) -> None:
    made = MadeStore(tmp_path / "store")
    batch = made.add_batch([line(1)])
    made.store.request_cancel(batch, 7)
    replica = Echo()
    asyncio.run(made.until(made.coordinator(replica), lambda: is_over(made, batch)))
    done = made.batch(batch)
    assert (done.status, done.total, done.output_file_id, done.error_file_id) == (BatchStatus.CANCELLED, 0, None, None)
    assert not replica.asked


def test_a_damaged_part_is_run_again(tmp_path: Path) -> None:
    made = MadeStore(tmp_path / "store")
    batch = made.add_batch([line(number) for number in range(24)])
    replica = Echo()
    replica.gate.clear()
    replica.num_before_gate = 8
    asyncio.run(made.until(made.coordinator(replica, target=8), lambda: made.batch(batch).completed == 8))
    (part,) = Path(made.store.job(batch.id).root).glob("*.parquet")
    part.write_bytes(b"torn")
    again = Echo()
    asyncio.run(made.until(made.coordinator(again), lambda: is_over(made, batch)))
    assert len(again.asked) == 24 and len(made.lines(made.batch(batch).output_file_id)) == 24


def test_the_sweep(tmp_path: Path) -> None:
    made = MadeStore(tmp_path / "store")
    batch = made.add_batch([line(1)], output_expires_s=5 * DAY_S)
    asyncio.run(made.until(made.coordinator(Echo()), lambda: is_over(made, batch)))
    done = made.batch(batch)
    made.store.create_content(OWNER, "file-" + f"{int(made.now_s * 1000):011x}" + "0" * 13).close()

    def left(days: float) -> tuple[int, int, bool]:
        sweep(made.store, made.now_s + days * DAY_S, 90 * DAY_S)
        contents = list(made.store.contents())
        return len(made.store.file_ids(OWNER)), len(contents), made.store.batch(OWNER, done.id) is not None

    assert left(0) == (2, 3, True)  # input, output, and what was never finished
    assert left(2) == (1, 1, True)  # the input expired after 1,000 s
    assert left(6) == (0, 0, True)
    assert left(91) == (0, 0, False)
    assert not (tmp_path / "store" / "jobs" / done.id).exists()


def test_a_lost_store_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeStore(tmp_path / "store")
    batch = made.add_batch([line(number) for number in range(20)])
    failures = iter([True] * 3)
    publish = type(made.store.folder).publish

    def fail(folder: object, name: str, content: bytes) -> None:
        if name.endswith(".parquet") and next(failures, False):
            raise JobError("the disk is full")
        publish(folder, name, content)  # type: ignore[arg-type]

    monkeypatch.setattr(type(made.store.folder), "publish", fail)
    asyncio.run(made.until(made.coordinator(Echo()), lambda: is_over(made, batch)))
    assert made.batch(batch).completed == 20


def test_the_budget_takes_turns_and_gives_back() -> None:
    async def check() -> None:
        budget, order = RowBudget(10), list[str]()

        async def ask(name: str, rows: float) -> object:
            release = await budget.acquire(rows)
            order.append(name)
            return release

        first = await budget.acquire(8)
        second = await budget.acquire(8)  # fewer than the target are in flight
        waiting = [asyncio.create_task(ask(name, 8)) for name in ("a", "b")]
        await asyncio.sleep(0)
        first()
        first()
        await asyncio.sleep(0.01)
        assert (order, budget.in_flight) == (["a"], 16)
        budget.target = 20
        await asyncio.gather(*waiting)
        second()
        assert order == ["a", "b"] and budget.in_flight == 16

    asyncio.run(check())


def test_a_store_in_a_bucket(bucket: str) -> None:
    made = MadeStore(f"s3://{bucket}/some/store")
    batch = made.add_batch([line(number) for number in range(20)])
    replica = Echo()
    replica.gate.clear()
    replica.num_before_gate = 8
    asyncio.run(made.until(made.coordinator(replica, target=8), lambda: made.batch(batch).completed == 8))
    asyncio.run(made.until(made.coordinator(Echo()), lambda: is_over(made, batch)))
    done = made.batch(batch)
    assert (done.status, done.completed, len(made.lines(done.output_file_id))) == (BatchStatus.COMPLETED, 20, 20)
    assert verify(made.store.job(batch.id).path).closes
    assert made.store.num_bytes() > 1000
    sweep(made.store, made.now_s + 200 * DAY_S, 90 * DAY_S)
    assert made.store.batch(OWNER, batch.id) is None and list(made.store.contents()) == []


def test_half_a_character_is_carried_through(tmp_path: Path) -> None:
    """JSON can express a lone surrogate, and UTF-8 cannot."""
    made = MadeStore(tmp_path / "store")
    batch = made.add_batch([line(1, prompt="\ud800"), line(2, prompt="\u5b57")])
    asyncio.run(made.until(made.coordinator(Echo()), lambda: is_over(made, batch)))
    found = made.lines(made.batch(batch).output_file_id)
    assert [found[name]["response"]["body"]["echo"] for name in ("c1", "c2")] == ["\ud800", "\u5b57"]


def test_no_line_is_left_out_where_a_part_cannot_be_read(tmp_path: Path) -> None:
    made = MadeStore(tmp_path / "store")
    batch = made.add_batch([line(number) for number in range(24)])
    asyncio.run(made.until(made.coordinator(Echo()), lambda: is_over(made, batch)))
    folder = made.store.job(batch.id)
    job = BatchJob.read(folder, (folder, "input.jsonl"), 1000, {})
    assert job is not None
    finalizing = replace(made.batch(batch), status=BatchStatus.FINALIZING)
    assert write_output_files(made.store, finalizing, job, 1, 2) == (made.batch(batch).output_file_id, None)
    next(Path(folder.root).glob("*.parquet")).unlink()
    with pytest.raises(JobError, match="the parts that can be read have 16 of 24 requests"):
        write_output_files(made.store, finalizing, job, 1, 2)
