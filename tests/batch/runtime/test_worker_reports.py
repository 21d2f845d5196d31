from moray.batch.ledger import Progress
from moray.batch.run_events import ExpertTokens
from moray.batch.runtime.worker_reports import WorkerReport, WorkerReports
from moray.batch.worker.stats import WorkerStats
from moray.engine.metrics import Metrics

STATS = WorkerStats(
    1.0,
    rows=3,
    seqs=4,
    waiting_seqs=1,
    free_blocks=3,
    blocks=8,
    max_num_seqs=64,
    max_num_batched_tokens=512,
    totals=Metrics(),
)


def test_progress_is_kept_and_statistics_are_returned_once() -> None:
    reports = WorkerReports()
    reports.store("a", WorkerReport([Progress(0, 1, 2, 3), Progress(1, 0, 0, 0)], [], STATS))
    reports.store("b", WorkerReport([Progress(2, 5, 5, 5)], [], STATS))
    assert sorted(progress.shard for progress in reports.progress) == [0, 1, 2]
    assert reports.pop_stats() == {"a": STATS, "b": STATS}
    reports.store("a", WorkerReport([Progress(1, 4, 4, 4)], [], STATS))
    assert sorted((progress.shard, progress.rows) for progress in reports.progress) == [(1, 4), (2, 5)]
    assert reports.pop_stats() == {"a": STATS}


def test_a_process_that_ended_is_dropped_with_its_shards_and_experts() -> None:
    reports = WorkerReports()
    reports.store("a", WorkerReport([Progress(3, 1, 1, 1), Progress(1, 1, 1, 1)], [], STATS, 0.0, [[1, 2], [3, 0]]))
    reports.store("a", WorkerReport([Progress(3, 1, 1, 1), Progress(1, 1, 1, 1)], [], STATS))
    assert reports.expert_tokens == [ExpertTokens("a", [[1, 2], [3, 0]])], "read less often than the rest"
    assert reports.drop("a") == ([1, 3], ExpertTokens("a", [[1, 2], [3, 0]]))
    assert (reports.progress, reports.pop_stats(), reports.expert_tokens) == ([], {}, [])
    assert reports.drop("a") == ([], None)
