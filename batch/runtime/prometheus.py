"""JobMetrics: a job's metrics for Prometheus, exported through Ray, which puts `ray_` before their names.

The totals and the present contents of the engines have the names that they have at the endpoint's /metrics.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from urllib.parse import quote

from ray.util.metrics import Counter, Gauge

from moray.batch.status.status import Status
from moray.batch.worker.stats import WorkerStats
from moray.engine.metrics import COUNTED, Metrics, prometheus_name

LABEL = "job_name"  # Prometheus itself uses `job`
_ASCII = "".join(map(chr, range(128)))
GAUGES = {
    "rows": "Input rows by state; they are counted as ok or failed when their part is committed.",
    "errors": "Failed rows by error code.",
    "cut_rows": "Rows that are ok with a structured output that max_tokens cut.",
    "workers": "Workers that hold the model (alive) or load it (starting).",
    "eta_s": "Estimated seconds to the end of the job, lower and upper bound.",
    "seqs": "Samples of the rows that workers hold and have not finished.",
    "waiting_seqs": "Samples that workers hold and that are not part of a step yet.",
    "free_blocks": "Blocks of the KV caches that can be allocated; they may hold cached prefixes.",
    "blocks": "Blocks of the KV caches of all workers.",
    "worker_s": "Seconds for which workers were held, over all runs of the job.",
    "gpu_s": "Seconds for which GPUs were held, over all runs of the job.",
}


class JobMetrics:
    """Exports the metrics of a job's driver, summed over its workers.

    Ray sends them every few seconds while the driver lives.
    """

    def __init__(self, job_name: str) -> None:
        self._job_name = to_label(job_name)
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._counted: defaultdict[str, float] = defaultdict(float)
        self._errors: dict[str, int] = {}

    def set(self, status: Status, stats: Sequence[WorkerStats], totals: Metrics) -> None:
        """Set all metrics.

        stats:   statistics of the workers that are alive
        totals:  totals of all engines of this run
        """
        rows = {"ok": status.ok_rows, "failed": status.failed_rows, "pending": status.pending_rows}
        for state, number in rows.items():
            self._set("rows", number, state=state)
        self._errors = dict.fromkeys(self._errors, 0) | dict(status.errors)
        for code, number in self._errors.items():
            self._set("errors", number, code=code)
        self._set("cut_rows", status.cut_rows)
        for state, number in {"alive": status.workers, "starting": status.workers_starting}.items():
            self._set("workers", number, state=state)
        for bound, seconds in {"low": status.eta_low_s, "high": status.eta_high_s}.items():
            if seconds is not None or status.state.is_final:
                self._set("eta_s", seconds or 0.0, bound=bound)
        for name in ("seqs", "waiting_seqs", "free_blocks", "blocks"):
            self._set(name, sum(getattr(worker, name) for worker in stats))
        self._set("worker_s", status.worker_s)
        self._set("gpu_s", status.card_s)
        for name, total in asdict(totals).items():
            self._count(name, total)

    def _set(self, name: str, value: float, **labels: str) -> None:
        if name not in self._gauges:
            self._gauges[name] = Gauge(prometheus_name(name), GAUGES[name], (LABEL, *labels))
        self._gauges[name].set(value, {LABEL: self._job_name, **labels})

    def _count(self, name: str, total: float) -> None:
        if name not in self._counters:
            self._counters[name] = Counter(prometheus_name(name), COUNTED[name], (LABEL,))
        increase = total - self._counted[name]
        if increase > 0:
            self._counted[name] = total
            self._counters[name].inc(increase, {LABEL: self._job_name})


def to_label(name: str) -> str:
    """Encode a name as a label value for Ray, which accepts only ASCII.

    Other characters are written as in URLs: %C3%A9 for an é.
    """
    return quote(name, safe=_ASCII, errors="replace")
