"""A connection to Ray: to a local Ray that ends with the job, or to a cluster.

Ray reads its environment when it is imported, so nothing may import it before this module does.
"""

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread

from moray.batch.processes.descendants import end_programs
from moray.batch.runtime.ray_choice import RayChoice, make_folder, prepare_environment, remove_folder
from moray.batch.runtime.ray_internals import (
    keep_sigterm_handler,
    kill_at_shutdown,
    own_process_groups,
    redirect_reports,
    skip_shutdown_at_exit,
    without_idle_daemons,
)
from moray.batch.runtime.ray_watch import TIMED_OUT, RayWatch
from moray.engine.errors import JobError, UserError

ALARM_POLL_S = 0.2  # between two looks at whether C++ has set an alarm, which goes off after 3 s
START_ATTEMPTS = 3  # starts of a local Ray that does not come up in time
ERROR_LINE = re.compile(r"[\w.]+(Error|Exception): ")  # the last line of a traceback


@contextmanager
def ray_session(
    choice: RayChoice,
    on_report: Callable[[str], None],
    keeps_logs: Callable[[bool], bool] = lambda has_failed: has_failed,
    token: str | None = None,
    watch: RayWatch | None = None,
    ends_at_once: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Connect to Ray for the length of the context.

    Where the process is connected already, that connection is used and kept.

    on_report:     called, in another thread, with what Ray's daemons report (a process that was killed, and why)
    keeps_logs:    called at the end with whether an exception other than a UserError ended the session; returns whether
                   the folder of a Ray that was started here is to stay
    token:         part of the name of that folder; None makes one
    watch:         watches a Ray that is started here; None = nothing does
    ends_at_once:  called at the end; returns whether a Ray that was started here is to be killed, not asked to end

    Raises JobError where Ray cannot be joined, or cannot be started in three attempts. A Ray that was started here ends
    here, and its folder, which nothing else uses, is removed; nothing of a cluster is removed.
    """
    prepare_environment(is_local=choice.address is None)
    import ray

    if ray.is_initialized():
        yield
        return
    folder = make_folder(choice.parent, token) if choice.address is None else None
    keeps_folder = False
    try:
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                with nullcontext() if folder is None or watch is None else watch.starting(folder):
                    _connect(choice.address, folder, on_report)
                break
            except Exception as error:
                if folder is not None and TIMED_OUT in str(error) and attempt < START_ATTEMPTS:
                    on_report("Ray did not come up in time, as on a busy machine; it is started again")
                    _abort_start(folder)
                    remove_folder(folder)
                    folder = make_folder(choice.parent, token)
                    continue
                keeps_folder = folder is not None
                raise JobError(_explain_connection_error(error, choice.address, folder)) from error
            except BaseException:  # raised by a signal
                if folder is not None:
                    _abort_start(folder)
                raise
        has_failed = is_broken_off = False
        try:
            yield
        except Exception as error:
            has_failed = not isinstance(error, UserError)
            raise
        except BaseException:  # raised by a signal
            is_broken_off = True
            raise
        finally:
            keeps_folder = keeps_logs(has_failed)
            if folder is not None and (is_broken_off or ends_at_once()):
                kill_at_shutdown(lambda: end_programs(str(folder)))
            ray.shutdown(wait_for_processes=True)  # otherwise they could write to the folder while it is removed
    finally:
        if folder is not None and not keeps_folder:
            remove_folder(folder)


def _connect(address: str | None, folder: Path | None, on_report: Callable[[str], None]) -> None:
    """Join the cluster at the address; None starts a Ray in the folder, whatever other Ray runs on this machine."""
    import ray

    redirect_reports(on_report)
    with ExitStack() as start, _muted_stderr(), _kept_signals():  # Ray writes to stderr that its logs are off
        if address is None:
            start.enter_context(without_idle_daemons())
            start.enter_context(own_process_groups())
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=None if folder is None else str(folder),
        )


def _abort_start(folder: Path) -> None:
    """End a Ray that has been started in part.

    Ray itself does that only when Python ends, and writes to the folder until then.
    """
    skip_shutdown_at_exit()
    end_programs(str(folder))


def _explain_connection_error(error: Exception, address: str | None, folder: Path | None) -> str:
    """Return what failed and the line that gives the cause: the rest of Ray's messages is advice for all cases."""
    lines = [
        line.strip() for failure in (error.__cause__, error) for line in str(failure or "").splitlines() if line.strip()
    ]
    reason = lines[0] if lines else type(error).__name__
    if "Traceback (most recent call last)" in reason:
        reason = next((line for line in lines if ERROR_LINE.match(line)), reason)
    if address is None:
        return f"Ray did not start on this machine: {reason} (its logs: {folder})"
    if "AuthenticationError" in f"{type(error).__name__} {reason}":
        reason = "it asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to that of the cluster"
    elif reason.startswith("No node info found"):
        reason = "this machine is no node of it; run moray on one, or moray submit SPEC --address http://HEAD:8265"
    return f"the Ray cluster at {address} could not be joined: {reason}"


@contextmanager
def _muted_stderr() -> Iterator[None]:
    """Redirect the file descriptor of stderr to /dev/null, because C++ writes to the descriptor."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


@contextmanager
def _kept_signals() -> Iterator[None]:
    """Restore the process's signal handlers, which ray.init replaces twice and without an option against it.

    Its Python side installs one for SIGTERM. Its C++ side then installs Abseil's failure handler, which passes SIGTERM
    on to ours but sets an alarm that aborts the process three seconds later, in the middle of an orderly end. On a busy
    machine ray.init takes longer than that after it has installed the handler, so a thread takes the alarm back.
    """
    keep_sigterm_handler()
    if current_thread() is not main_thread():  # Python handles signals in the main thread only
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    has_alarm = signal.getitimer(signal.ITIMER_REAL)[0] > 0  # of somebody else's
    is_over = Event()

    def cancel_alarms() -> None:
        while not has_alarm and not is_over.wait(ALARM_POLL_S):
            signal.alarm(0)

    canceller = Thread(target=cancel_alarms, name="ray-alarms", daemon=True)
    canceller.start()
    try:
        yield
    finally:
        is_over.set()
        canceller.join()
        for number, handler in handlers.items():
            if handler is not None:  # None is a handler that Python did not install
                signal.signal(number, handler)  # although Python believes that this handler is installed
        if not has_alarm:  # the alarm of a SIGTERM that came in between
            signal.alarm(0)
