"""RunContext: what one run of a job works on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from secrets import token_hex

from moray.batch.ledger import Ledger
from moray.batch.output.folder import OutputFolder
from moray.batch.plan.planner import PlannedJob
from moray.batch.runtime.driver_link import DriverLink
from moray.batch.shards import Shard


def make_run_name(now: datetime) -> str:
    """Return the name of a run that begins now; names sort by time, those of two runs in one second too."""
    return f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03}Z-{token_hex(2)}"


@dataclass(frozen=True)
class RunContext:
    """Holds the job, the state of its output folder, and how this run differs from others.

    folder:        the job's output folder
    ledger:        which shards are committed; the run keeps it up to date
    retry_shards:  in a retry, the rows to run again, by shard; None in an ordinary run
    link:          the connection to the parent process
    name:          the run's name: when it began, and a random part
    """

    job: PlannedJob
    folder: OutputFolder
    ledger: Ledger
    retry_shards: Mapping[int, Shard] | None = None
    link: DriverLink = field(default_factory=DriverLink)
    name: str = field(default_factory=lambda: make_run_name(datetime.now(UTC)))

    @property
    def is_retry(self) -> bool:
        return self.retry_shards is not None

    @property
    def pending_shards(self) -> list[Shard]:
        """Return the shards that are not committed; in a retry each with the rows to run again."""
        shards = self.job.plan.shards if self.retry_shards is None else self.retry_shards
        return [shards[index] for index in self.ledger.pending_shards]
