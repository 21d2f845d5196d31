"""Check grammars in a process of its own, which may be ended, or end, because of one.

Code that runs in a thread cannot be stopped, and some grammars of a few kilobytes would run for hours. Others end their
process: llguidance follows a chain of 5,000 rules by recursion, beyond the end of the stack.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress

from moray.engine.errors import RequestError
from moray.engine.structured.constraint import Structured

MAX_MEMORY = 2 << 30  # bytes of the process's address space
STACK = 1 << 20  # bytes in which a grammar is checked; a thread that compiles it has some 8 MiB
NICENESS = 5  # the engine goes first where cores are short
CPU_LIMIT_S = 5.0  # CPU time for checking one grammar
PATIENCE_S = 60.0  # until an answer must come, on a machine that is busy with other work


class GrammarChecker:
    """Checks grammars one after the other; one thread uses it. The process is started for the first, and kept.

    It ends with the checker, and with the process that has it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, structured: Structured, cpu_limit_s: float) -> None:
        """Do what Structured.check does. Raises RequestError("bad_grammar"), also for what takes too much CPU time."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([cpu_limit_s, structured.__dict__]).encode() + b"\n")
            process.stdin.flush()
            is_ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
        except BrokenPipeError:
            is_ready = [process.stdout]  # at its end
        answer = process.stdout.readline() if is_ready else b""
        if not answer:
            self.close()
            is_slow = not is_ready or process.returncode == -signal.SIGPROF
            what = f"takes longer than {cpu_limit_s:g} s" if is_slow else "is too large or too deeply nested"
            raise RequestError("bad_grammar", f"{what} to check; make it simpler", field="structured")
        if (error := json.loads(answer)) is not None:
            code, message = error
            raise RequestError(code, message, field="structured")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            if self._process.stdout is not None and not select.select([self._process.stdout], [], [], 0)[0]:
                self._process.kill()  # unless it has ended
            self._process.communicate()
            self._process = None

    def __del__(self) -> None:
        self.close()

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "moray.engine.structured.checker"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


_own = threading.local()  # checker: the GrammarChecker of a thread


def check_apart(structured: Structured) -> None:
    """Do what Structured.check does, in a process that the calling thread keeps for it.

    Raises RequestError("bad_grammar"), also for what takes more than CPU_LIMIT_S or ends the process.
    """
    if not hasattr(_own, "checker"):
        _own.checker = GrammarChecker()
    _own.checker.check(structured, CPU_LIMIT_S)


def main() -> None:
    """Check the grammars that stdin has, one a line, and answer each with a line. Ends at the end of stdin."""
    os.nice(NICENESS)
    with suppress(ValueError, OSError):  # the process may have a lower limit already
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    threading.stack_size(STACK)
    worker = threading.Thread(target=_answer_lines)
    worker.start()
    worker.join()


def _answer_lines() -> None:
    for line in sys.stdin:
        cpu_limit_s, fields = json.loads(line)
        error = None
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)  # its signal ends the process
        try:
            Structured(**fields).check()
        except RequestError as found:
            error = [found.code, found.message]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    main()
