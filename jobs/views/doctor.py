"""Show the findings of `moray doctor` as text or as JSON."""

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moray.batch.units import count
from moray.jobs.doctor.finding import Finding, Verdict

STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "bold red"}


def worst(findings: Sequence[Finding]) -> Verdict:
    """Return the worst verdict of all findings; OK where there are none."""
    found = {finding.verdict for finding in findings}
    return next((verdict for verdict in (Verdict.PROBLEM, Verdict.WARNING) if verdict in found), Verdict.OK)


def describe(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings as JSON values; docs/doctor.md has the shape."""
    counts = Counter(finding.verdict for finding in findings)
    return {
        "moray": version("moray"),
        "verdict": str(worst(findings)),
        "counts": {str(verdict): counts[verdict] for verdict in Verdict},
        "findings": [
            {
                "section": finding.section,
                "name": finding.name,
                "verdict": str(finding.verdict),
                "value": finding.value,
                "fix": finding.fix,
            }
            for finding in findings
        ],
    }


def render(findings: Sequence[Finding]) -> Group:
    """Render a table for each section, with each fix below its finding, and a summary."""
    width = max(len(finding.name) for finding in findings)
    return Group(*_sections(findings, width), _summary(findings))


def _sections(findings: Sequence[Finding], width: int) -> Iterator[RenderableType]:
    for section, rows in groupby(findings, key=lambda finding: finding.section):
        yield Text(section, style="bold cyan")
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=max(map(len, Verdict)), no_wrap=True)
        table.add_column(min_width=width, no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(Text(row.verdict, STYLES[row.verdict]), Text(row.name), Text(row.value))
            if row.fix is not None:
                table.add_row("", Text("fix", "dim"), Text(row.fix))
        yield table


def _summary(findings: Sequence[Finding]) -> Text:
    counts = Counter(finding.verdict for finding in findings)
    words = [f"{counts[Verdict.OK]} ok"]
    words += [count(counts[verdict], str(verdict)) for verdict in (Verdict.WARNING, Verdict.PROBLEM) if counts[verdict]]
    return Text(", ".join(words), STYLES[worst(findings)])
