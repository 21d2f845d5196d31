"""`moray verify`: whether a job's books close, in words."""

from batch.quantities import count
from batch.verify import Verification

SHOWN = 20


def draw(path: str, found: Verification) -> str:
    verdict = "closes" if found.closes else "does not close"
    missing = f" + {found.pending:,} not there" if found.pending else ""
    codes = ", ".join(f"{code} {number:,}" for code, number in found.errors.most_common())
    lines = [
        f"{path} {verdict}",
        f"  {count(found.input_rows, 'row')} in = {found.ok:,} ok + {found.failed:,} failed{missing}"
        + (f" ({codes})" if codes else ""),
        f"  {found.parts:,} of {count(found.shards, 'part')} there and right (rows, samples, schema, record)",
        *(f"  {problem}" for problem in found.problems[:SHOWN]),
    ]
    if len(found.problems) > SHOWN:
        lines.append(f"  and {len(found.problems) - SHOWN:,} more; all of them: --json")
    if not found.closes:
        lines.append("  Delete the files named here, if any, and run the job again: it does what is not there.")
    return "\n".join(lines)
