"""Run the driver as a child of the process that the user started. The parent stays small, watches it and restarts it.

A driver that is killed, crashes, or loses its local Ray cannot report that. The parent then ends the processes it left
behind, and starts another driver, which continues the job, or records how the job ended.
"""

import os
import secrets
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

from moray.batch.processes.descendants import adopt_orphans, end_descendants, mark_descendants
from moray.batch.processes.exit_reason import OomKills, describe_exit
from moray.batch.runtime.driver_link import DriverLink
from moray.batch.runtime.ray_choice import TOKEN_BYTES
from moray.batch.runtime.signals import SIGNALS, exit_on_signals
from moray.batch.status.restart import Restart
from moray.batch.units import count
from moray.engine.errors import JobError, UserError
from moray.jobs.driver.watched_driver import WatchedDriver

SAMPLE_EVERY_S = 2.0  # between two reads of the kernel's count of out-of-memory kills

Call = Callable[[DriverLink], int]


def run_driver(call: Call) -> int:
    """Run `call` in a child process, and again in another one where that dies.

    Returns the exit code of the command, in the parent and in the child.
    """
    parent = _Parent()
    while True:
        link = parent.start_driver()
        if link is not None:
            return _run_in_child(call, link)
        parent.watch_driver()
        code = parent.decide()
        if code is not None:
            return code


def _run_in_child(call: Call, link: DriverLink) -> int:
    """Run `call` and report its exit code to the parent process. Exceptions pass through."""
    try:
        code = call(link)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        link.report_exit(2 if isinstance(error, UserError) else code, str(error).partition("\n")[0])
        raise
    link.report_exit(code)
    return code


class _Parent:
    """Starts, watches and restarts the driver, one at a time, in the process that the user started.

    It forks, so it must import nothing large and have no threads.
    """

    def __init__(self) -> None:
        adopt_orphans()
        self._oom_kills = OomKills()
        self._wake, self._wake_writer = socket.socketpair()  # receives the number of each signal
        self._wake.setblocking(False)
        self._wake_writer.setblocking(False)
        self._signals: list[int] = []
        self._driver: WatchedDriver | None = None
        self._lost: WatchedDriver | None = None  # the last driver that had started a run
        self._num_restarts = 0
        self._num_fruitless = 0  # restarts since a part was last committed
        self._reason = ""  # why the last driver died

    def start_driver(self) -> DriverLink | None:
        """Fork a driver. Returns None in the parent, and the link to the parent in the child."""
        ours, theirs = socket.socketpair()
        token = secrets.token_hex(TOKEN_BYTES)
        handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        sys.stdout.flush()  # else parent and child would both write what is buffered
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            for socket_of_parent in (ours, self._wake, self._wake_writer):
                socket_of_parent.close()
            link = self._become_driver(theirs, token)
        else:
            theirs.close()
            self._driver, link = WatchedDriver(pid, ours, token), None
            signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
            for number in (*handled, signal.SIGCHLD):
                signal.signal(number, lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        return link

    def _become_driver(self, channel: socket.socket, token: str) -> DriverLink:
        mark_descendants(token)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # The parent passes SIGHUP on. Ray's processes inherit this, and outlive the terminal until the job ends.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        exit_on_signals()
        restart = None
        if self._lost is not None and self._lost.run is not None:
            lost = self._lost.run
            restart = Restart(self._num_restarts, self._reason, lost.run, lost.spec, lost.began_s)
        link = DriverLink(channel, restart, token)
        link.listen()
        return link

    def watch_driver(self) -> None:
        """Wait until the driver has ended. It is killed when its local Ray dies."""
        driver = self._driver
        assert driver is not None
        while driver.status is None:
            ready, _, _ = select.select([self._wake.fileno(), *driver.descriptors], [], [], SAMPLE_EVERY_S)
            self._oom_kills.sample(SAMPLE_EVERY_S)
            driver.read_reports()
            for descriptor in ready:
                if descriptor in driver.ray:
                    driver.end_without_ray(descriptor, self._oom_kills.recent)
            self._forward_signals(driver)
            self._reap(driver)
        driver.read_reports()
        driver.forget_ray()
        driver.channel.close()

    def decide(self) -> int | None:
        """End what the driver left running. Returns the command's exit code; None = start another driver."""
        driver = self._driver
        assert driver is not None and driver.status is not None
        oom_kills = self._oom_kills.recent
        end_descendants(driver.token)
        before, self._lost = self._lost, driver if driver.run is not None else self._lost
        if driver.exit_code is not None:
            if driver.run is None and before is not None:  # it ended before it could continue the run
                failure = f"; it could not be started again: {driver.error}" if driver.error else ""
                return self._give_up(self._reason + failure, driver.exit_code)
            if driver.exit_code not in (1, 2):  # after a failure Ray's logs are kept
                driver.remove_ray_folders()  # again: a process that still ran may have written since
            return driver.exit_code
        self._reason = driver.lost_ray or f"the driver {describe_exit(driver.status, oom_kills)}"
        if self._signals or self._lost is None or self._lost.run is None:
            return self._give_up(self._reason, 1)
        if driver.has_committed:
            self._num_fruitless = 0
        elif driver.run is not None and before is not None and before.run is not None:
            # The driver before committed a part and died before it could report that.
            has_progressed = driver.run.num_committed > before.run.num_committed
            self._num_fruitless = 1 if has_progressed else self._num_fruitless
        max_restarts = self._lost.run.max_restarts
        if self._num_fruitless >= max_restarts:
            logs = "" if driver.lost_ray is None or driver.is_ray_up else f"; Ray's logs: {driver.ray_folder}"
            return self._give_up(f"{self._reason}; {_limit(max_restarts)}{logs}", 1)
        self._num_fruitless += 1
        self._num_restarts += 1
        driver.remove_ray_folders()
        restart = f"The driver is started again and continues the job (restart {self._num_restarts})."
        self._print(f"{_sentence(self._reason)} {restart}")
        return None

    def _forward_signals(self, driver: WatchedDriver) -> None:
        with suppress(BlockingIOError):
            numbers = [number for number in self._wake.recv(64) if number in SIGNALS]
            self._signals += numbers
            driver.forward_signals(bytes(numbers))

    def _reap(self, driver: WatchedDriver) -> None:
        """Collect the children that have ended, among them orphans of the driver."""
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == driver.pid:
                    driver.status = found[1]

    def _give_up(self, reason: str, code: int) -> int:
        """Record how the job ended, if a run had started. Returns the exit code."""
        self._print(_sentence(reason))
        if self._signals:
            code = 128 + self._signals[0]
        if self._lost is None or self._lost.run is None:
            return code
        from moray.batch.runtime.lost_run import settle_lost_run, write_last_report
        from moray.batch.spec import JobSpec
        from moray.jobs.views import status_text

        run = self._lost.run
        name = signal.Signals(self._signals[0]).name if self._signals else None
        try:
            status = settle_lost_run(
                run.output,
                run.run,
                JobSpec.from_yaml(run.spec),
                reason,
                signal=name,
                restarts=self._num_restarts,
                is_retry=run.is_retry,
            )
        except (OSError, UserError, JobError) as error:
            self._print(f"{run.output} could not be brought up to date: {error}")
            return code if self._signals else 1
        if status is None:  # another run has the folder
            return code if self._signals else 1
        if self._driver is not None and status.exit_code != 1:
            self._driver.remove_ray_folders()  # after a failure Ray's logs are kept
        for line in (write_last_report(run.output), *status_text.summary(status)):
            print(line, flush=True)
        return status.exit_code

    def _print(self, text: str) -> None:
        if sys.stdout.isatty():
            sys.stdout.write("\n\x1b[?25h")  # start a line below the progress bar and show the cursor that it hides
            sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)


def _sentence(reason: str) -> str:
    return f"{reason[0].upper()}{reason[1:].removesuffix('.')}."


def _limit(max_restarts: int) -> str:
    if max_restarts == 0:
        return "limits.restarts is 0"
    restarted = f"restarted {count(max_restarts, 'time')} with no part committed in between"
    return f"{restarted} (limits.restarts is {max_restarts})"
