"""JobMetrics: a job's figures for Prometheus, through Ray. Ray puts `ray_` before the names.

The engines' totals have the names of engine/metrics.py, what is in them those of the endpoint's /metrics.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict

from ray.util.metrics import Counter, Gauge

from batch.watch.figures import Figures
from batch.watch.status import Status
from engine.metrics import Metrics

LABEL = "job_name"  # `job` is Prometheus' own
GAUGES = {
    "rows": "input rows; they are counted as ok or failed when their part is committed",
    "errors": "failed rows by code",
    "workers": "workers that hold the model, or load it",
    "eta_s": "seconds to the end of the job, from and to",
    "seqs": "samples in the workers",
    "waiting_seqs": "samples that wait for a place in a step",
    "free_blocks": "blocks of the KV cache that can be had",
    "blocks": "blocks of the KV cache",
    "worker_s": "seconds for which workers were held, over all runs of the job",
    "card_s": "the same of their GPUs",
}


class JobMetrics:
    """What a job's driver exports, summed over its workers. Ray sends it every few seconds while the driver lives."""

    def __init__(self, job_name: str) -> None:
        self._job_name = job_name
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._counted: defaultdict[str, float] = defaultdict(float)
        self._errors: dict[str, int] = {}

    def set(self, status: Status, figures: Sequence[Figures], totals: Metrics) -> None:
        """
        figures: of the workers that are alive
        totals:  of all engines of this run
        """
        rows = {"ok": status.ok_rows, "failed": status.failed_rows, "pending": status.pending_rows}
        for state, number in rows.items():
            self._set("rows", number, state=state)
        self._errors = dict.fromkeys(self._errors, 0) | dict(status.errors)
        for code, number in self._errors.items():
            self._set("errors", number, code=code)
        for state, number in {"alive": status.workers, "starting": status.workers_starting}.items():
            self._set("workers", number, state=state)
        for bound, seconds in {"low": status.eta_low_s, "high": status.eta_high_s}.items():
            if seconds is not None or status.state.is_final:
                self._set("eta_s", seconds or 0.0, bound=bound)
        for name in ("seqs", "waiting_seqs", "free_blocks", "blocks"):
            self._set(name, sum(getattr(one, name) for one in figures))
        self._set("worker_s", status.worker_s)
        self._set("card_s", status.card_s)
        for name, total in asdict(totals).items():
            self._count(name, total)

    def _set(self, name: str, value: float, **labels: str) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"moray_{name}", GAUGES[name], (LABEL, *labels))
        self._gauges[name].set(value, {LABEL: self._job_name, **labels})

    def _count(self, name: str, total: float) -> None:
        if name not in self._counters:
            self._counters[name] = Counter(f"moray_{name}", "see engine/metrics.py", (LABEL,))
        more = total - self._counted[name]
        if more > 0:
            self._counted[name] = total
            self._counters[name].inc(more, {LABEL: self._job_name})
