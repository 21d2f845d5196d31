"""run_job and retry_job: run what is not done of a job, or what has failed."""

from collections.abc import Collection

from moray.batch.ledger import Ledger
from moray.batch.output.failed_rows import find_failed
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import check_folder
from moray.batch.output.part import find_committed
from moray.batch.plan.planner import plan_job
from moray.batch.runtime.driver_link import DriverLink
from moray.batch.runtime.progress_reporting import Display
from moray.batch.runtime.run import JobResult, JobRun
from moray.batch.runtime.run_context import RunContext
from moray.batch.spec import JobSpec
from moray.batch.units import count
from moray.engine.errors import OutputError


def run_job(
    spec: JobSpec,
    *,
    address: str | None = None,
    display: Display | None = None,
    price: float | None = None,
    link: DriverLink | None = None,
) -> JobResult:
    """Run a job to its end, continuing from where its last run stopped.

    address:  address of a Ray cluster; None runs on this machine
    display:  where a person follows the job
    price:    USD for an hour of a GPU, or of a worker where there are no GPUs; used by the forecast
    link:     the connection to a parent process that restarts this one when it dies

    Raises UserError where the spec, the input, the model or the output folder is wrong. A job that fails otherwise has
    a result that gives the reason.
    """
    job = plan_job(spec)
    folder = OutputFolder(spec.output.path)
    check_folder(folder, job.plan)
    shards = [shard.num_rows for shard in job.plan.shards]
    ledger = Ledger(shards, find_committed(folder, job.plan), spec.limits.max_failed(sum(shards)))
    return JobRun(RunContext(job, folder, ledger, link=link or DriverLink()), display, price).run(address)


def retry_job(
    spec: JobSpec,
    codes: Collection[str] = (),
    *,
    address: str | None = None,
    display: Display | None = None,
    link: DriverLink | None = None,
) -> JobResult:
    """Run the failed rows of a finished job again, or only those that failed with one of the codes.

    Each part that holds such a row is replaced as a whole. Raises UserError as run_job does, and where the job is not
    finished.
    """
    job = plan_job(spec)
    folder = OutputFolder(spec.output.path)
    check_folder(folder, job.plan)
    shards = [shard.num_rows for shard in job.plan.shards]
    committed = find_committed(folder, job.plan)
    pending = sum(rows for shard, rows in enumerate(shards) if shard not in committed)
    if pending:
        raise OutputError(
            f"{folder.path}: {count(pending, 'row')} not done yet; retry is for jobs that are. Run it first."
        )
    retry_shards = find_failed(folder, job.plan, committed, codes)
    complete = {shard: counts for shard, counts in committed.items() if shard not in retry_shards}
    ledger = Ledger(shards, complete, spec.limits.max_failed(sum(shards)), stops_at_limit=False)
    return JobRun(RunContext(job, folder, ledger, retry_shards, link or DriverLink()), display).run(address)
