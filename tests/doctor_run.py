"""`moray doctor` as a user runs it, and what it says."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from patience import PATIENCE_S


@dataclass(frozen=True)
class Answer:
    """Holds the output of the doctor.

    findings: (section, name) -> the findings with that name
    """

    code: int
    findings: dict[tuple[str, str], list[dict[str, Any]]]

    def one(self, section: str, name: str) -> dict[str, Any]:
        (finding,) = self.findings[section, name]
        return finding

    def verdict_and_text(self, section: str, name: str) -> tuple[str, str]:
        """Return the verdict, and value and fix in one text."""
        found = self.one(section, name)
        return found["verdict"], f"{found['value']} | {found['fix']}"

    def problems(self) -> list[dict[str, Any]]:
        return [one for found in self.findings.values() for one in found if one["verdict"] == "problem"]


SOME = """
import json, sys
from moray.jobs.views import doctor as doctor_view
from moray.jobs.doctor.finding import Subject
from moray.jobs.doctor.run import run_checks
from moray.jobs.doctor.table import CHECKS
section, address = sys.argv[1], sys.argv[2] or None
checks = [check for check in CHECKS if check.section == section and check.name != "rows"]
found = run_checks(checks, Subject(address=address))
print(json.dumps(doctor_view.describe(found)))
sys.exit(doctor_view.worst(found) == "problem")
"""


def ask_section(section: str, *, address: str = "", before: tuple[str, ...] = (), **variables: str) -> Answer:
    """Run the checks of one section, all but the slow one, as the command runs them."""
    return _run([*before, sys.executable, "-c", SOME, section, address], variables)


def ask(*arguments: str, **variables: str) -> Answer:
    """Run the command with --json."""
    return _run([sys.executable, "-m", "moray.jobs.cli", "doctor", "--json", *arguments], variables)


def _run(command: list[str], variables: dict[str, str]) -> Answer:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=bare | variables,
        timeout=PATIENCE_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode in (0, 1) and not done.stderr, (done.returncode, done.stdout, done.stderr)
    findings: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for finding in json.loads(done.stdout)["findings"]:
        findings.setdefault((finding["section"], finding["name"]), []).append(finding)
    return Answer(done.returncode, findings)
