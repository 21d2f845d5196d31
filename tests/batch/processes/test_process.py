"""Real processes that run, are stopped, are dead, and are reaped."""

import os
import signal
import subprocess
import time

from moray.batch.processes.process import end_process, is_alive, start_time


def test_a_process_that_heeds_no_signal_is_killed_and_no_other() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        started = start_time(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        assert end_process(process.pid, started, kill=False)
        assert not end_process(process.pid, "1", kill=True), "an id that was used again"
        assert is_alive(process.pid, started)
        assert end_process(process.pid, started, kill=True)
        end_s = time.monotonic() + 10
        while is_alive(process.pid, started):
            assert time.monotonic() < end_s
        assert not end_process(process.pid, started, kill=True), "dead, if nobody has noticed yet"
        assert process.wait() == -signal.SIGKILL
    assert start_time(process.pid) == "" and not is_alive(process.pid, "")
