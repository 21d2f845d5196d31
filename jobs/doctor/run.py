"""Run checks, each in a process of its own, so that none can hang or crash the command, or wait for another.

Drivers and dead file systems hang in ways that no exception ends, and compiled code may use an instruction that this
CPU lacks. The processes are forked, which is quick as long as nothing large was imported before.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from moray.engine.errors import UserError
from moray.jobs.doctor.finding import Finding, Subject, problem, warning

LIMIT_S = 30.0  # default time limit of a check; most take 0.1 s on an idle machine
MAX_RUNNING = 8  # checks at once, each with a pipe: the limit on open files may be low


@dataclass(frozen=True)
class Check:
    """Describes a check, one row of the table.

    section, name:  those of its findings, unless a finding has a name of its own
    find:           yields findings; none where there is nothing to check
    limit_s:        time after which it is killed
    """

    section: str
    name: str
    find: Callable[[Subject], Iterable[Finding]]
    limit_s: float = LIMIT_S


def run_checks(checks: Sequence[Check], subject: Subject) -> list[Finding]:
    """Return the findings of all checks, in the order of the table."""
    found: dict[int, list[Finding]] = {}
    pending = list(enumerate(checks))
    running: dict[int, _RunningCheck] = {}
    while pending or running:
        while pending and len(running) < MAX_RUNNING:
            index, check = pending.pop(0)
            running[index] = _RunningCheck(check, subject)
        first_end_s = min(one.end_s for one in running.values())
        wait([one.results for one in running.values()], max(0.0, first_end_s - time.monotonic()))
        for index, one in list(running.items()):
            if one.is_over():
                found[index] = running.pop(index).findings()
    return [finding for index in sorted(found) for finding in found[index]]


class _RunningCheck:
    """Runs a check in its process.

    results:  becomes readable when the check answers or its process ends
    end_s:    time at which it is killed, on the clock of time.monotonic()
    """

    def __init__(self, check: Check, subject: Subject) -> None:
        self._check = check
        context = get_context("fork")
        self.results, sender = context.Pipe(duplex=False)
        self.end_s = time.monotonic() + check.limit_s
        self._process: BaseProcess = context.Process(target=_answer, args=(check, subject, sender), daemon=True)
        self._process.start()
        sender.close()  # so that the pipe ends with the process

    def is_over(self) -> bool:
        """Return whether it has answered, has ended, or has reached its limit."""
        return self.results.poll() or time.monotonic() >= self.end_s

    def findings(self) -> list[Finding]:
        """Return its findings, and kill its process."""
        check = self._check
        try:
            found: list[Finding] = self.results.recv() if self.results.poll() else [_hanging(check)]
        except EOFError:
            self._process.join(1.0)
            found = [_crashed(self._process.exitcode)]
        self._process.kill()  # its findings are complete; a process that is stuck in the kernel is left behind
        self._process.join(0.1)
        self.results.close()
        return [replace(one, section=check.section, name=one.name or check.name) for one in found]


def _answer(check: Check, subject: Subject, results: Connection) -> None:
    """Run one check, in its process. What libraries print of their own is dropped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    results.send(answer(check, subject))


def answer(check: Check, subject: Subject) -> list[Finding]:
    """Return what a check finds; an exception is a finding too."""
    try:
        return list(check.find(subject))
    except UserError as error:
        return [problem(" ".join(str(error).split()), "see the message")]
    except ImportError as error:
        return [problem(f"{error.name or 'a package'} cannot be imported: {error}", "install moray's packages again")]
    except Exception as error:
        return [warning(f"not known: {type(error).__name__}: {error}", "this check failed itself; report it")]


def _hanging(check: Check) -> Finding:
    return problem(f"no answer within {check.limit_s:.0f} s", "something hangs: a disk, a driver or the network")


def _crashed(code: int | None) -> Finding:
    end = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    return problem(f"the check's process ended with {end}", "run it again; if it happens again, report it")
