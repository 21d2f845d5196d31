"""Checks that hang, crash or raise: each becomes a finding, and the other checks are not affected."""

import json
import subprocess
import sys

from patience import PATIENCE_S

SCRIPT = """
import json, os, signal, sys, time
from moray.engine.errors import UserError
from moray.jobs.doctor.finding import Subject, ok, warning
from moray.jobs.doctor.run import MAX_RUNNING, Check, run_checks

def good(subject):
    print("a library says something")
    os.write(2, b"and something else")
    yield ok(f"model {subject.model}")
    yield warning("two", "mend it", name="another name")

def nothing(_):
    return ()

def hang(_):
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    time.sleep(3600)
    yield ok("never")

def crash(_):
    os.kill(os.getpid(), signal.SIGSEGV)
    yield ok("never")

def leave(_):
    os._exit(3)
    yield ok("never")

def fail(_):
    yield ok("lost")
    raise ValueError("such a value")

def mistake(_):
    raise UserError("the path\\nis wrong")

def lacks(_):
    import a_package_that_is_not_there
    yield ok("never")

checks = [Check("A", "hang", hang, limit_s=1.0), Check("A", "good", good), Check("A", "nothing", nothing)]
checks += [Check("B", one.__name__, one) for one in (crash, leave, fail, mistake, lacks)]
checks += [Check("C", str(number), good) for number in range(2 * MAX_RUNNING)]
start_s = time.monotonic()
found = run_checks(checks, Subject(model="m"))
print(json.dumps([[one.section, one.name, one.verdict, one.value] for one in found]))
assert all((one.fix is None) == (one.verdict == "ok") for one in found)
"""


def test_whatever_a_check_does_is_a_finding() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found[:8] == [
        ["A", "hang", "problem", "no answer within 1 s"],
        ["A", "good", "ok", "model m"],
        ["A", "another name", "warning", "two"],
        ["B", "crash", "problem", "the check's process ended with SIGSEGV"],
        ["B", "leave", "problem", "the check's process ended with exit code 3"],
        ["B", "fail", "warning", "not known: ValueError: such a value"],
        ["B", "mistake", "problem", "the path is wrong"],
        [
            "B",
            "lacks",
            "problem",
            "a_package_that_is_not_there cannot be imported: No module named 'a_package_that_is_not_there'",
        ],
    ]
    assert [one[1] for one in found[8::2]] == [str(number) for number in range(16)]
