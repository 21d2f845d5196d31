"""Completes the records of a run whose driver died without writing them."""

import time
from contextlib import suppress
from dataclasses import replace

from moray.batch.format_error import format_error
from moray.batch.ledger import Ended, Ledger, SignalReceived, State
from moray.batch.output.event_log import append_events
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import read_plan
from moray.batch.output.lease import LEASE, read_holder
from moray.batch.output.part import find_committed
from moray.batch.run_events import DriverLost, RunEnded
from moray.batch.spec import JobSpec
from moray.batch.status.restart import Restart
from moray.batch.status.status import STATUS, Reporter, Status, read_status
from moray.batch.status.workers import Workers


def record_restart(folder: OutputFolder, restart: Restart) -> None:
    """Write into the events of the lost run why its driver ended."""
    append_events(folder, restart.run, DriverLost(restart.reason, will_restart=True))


def settle_lost_run(
    output: str, run: str, spec: JobSpec, reason: str, *, signal: str | None, restarts: int, is_retry: bool = False
) -> Status | None:
    """Write the status, the last events and the report of a run that will not be continued.

    signal:    the signal that was sent to the job before, which makes it CANCELLED; None makes it FAILED
    restarts:  how often its driver was restarted
    is_retry:  True where the run was to replace parts, so that it is no success that all parts exist

    Returns the status; None where another run holds the folder by now.
    """
    folder = OutputFolder(output)
    holder = read_holder(folder)
    if holder is not None and holder.run != run and not (holder.is_on_this_host and not holder.is_alive):
        return None
    found = read_status(folder)
    if found is not None and (found[0].run > run or (found[0].run == run and found[0].state.is_final)):
        return found[0] if found[0].state.is_final else None
    folder.remove_abandoned()
    plan = read_plan(folder)
    shards = [shard.num_rows for shard in plan.shards]
    ledger = Ledger(shards, find_committed(folder, plan), spec.limits.max_failed(sum(shards)))
    if found is not None and found[0].run == run:
        before = found[0]
    else:  # the driver died before it could write a status
        workers, warnings = Workers(), plan.warnings
        before = Reporter(spec.name, run, ledger, folder, time.monotonic, workers, warnings=warnings).status()
    if signal is not None:
        ledger.handle(SignalReceived(signal))
    ledger.handle(Ended(reason))
    is_cut_short = is_retry and ledger.state is State.SUCCEEDED
    status = replace(
        before,
        state=State.FAILED if is_cut_short else ledger.state,
        reason=reason if is_cut_short else ledger.reason,
        ok_rows=ledger.ok,
        failed_rows=ledger.failed,
        pending_rows=ledger.pending,
        rows_done=ledger.rows_done,
        committed_shards=len(ledger.committed),
        prompt_tokens=ledger.prompt_tokens,
        generated_tokens=ledger.generated_tokens,
        errors={code: number for code, number in ledger.errors.most_common() if number},
        eta_s=None,
        eta_low_s=None,
        eta_high_s=None,
        workers=0,
        workers_starting=0,
        restarts=restarts,
    )
    ended = RunEnded(status.state, status.reason, status.pending_rows)
    append_events(folder, run, DriverLost(reason, will_restart=False), ended)
    folder.write(STATUS, status.to_json().encode())
    with suppress(OSError):
        folder.remove(LEASE)
    return status


def write_last_report(output: str) -> str:
    """Write the report and return a line about it; a report that cannot be written does not change the job's result."""
    from moray.batch.report import write_report

    try:
        return f"  report: {write_report(output)}"
    except Exception as failure:
        return f"  The report could not be written: {format_error(failure)}"
