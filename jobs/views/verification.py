"""Format the result of `moray verify`."""

from moray.batch.output.verify import Verification
from moray.batch.units import count

SHOWN = 20  # problems that are listed at most


def render(path: str, found: Verification) -> str:
    """Format whether the output is complete, the counts, the first problems and what to do."""
    verdict = "is complete" if found.closes else "is not complete"
    missing = f" + {found.pending:,} missing" if found.pending else ""
    codes = ", ".join(f"{code} {number:,}" for code, number in found.errors.most_common())
    lines = [
        f"{path} {verdict}",
        f"  {count(found.input_rows, 'row')} in = {found.ok:,} ok + {found.failed:,} failed{missing}"
        + (f" ({codes})" if codes else ""),
        f"  {found.parts:,} of {count(found.shards, 'part')} present and valid (rows, samples, schema, record)",
        *(f"  {problem}" for problem in found.problems[:SHOWN]),
    ]
    if len(found.problems) > SHOWN:
        lines.append(f"  and {len(found.problems) - SHOWN:,} more; all of them: --json")
    if not found.closes:
        lines.append("  Delete the files named here, if any, and run the job again: it computes what is missing.")
    return "\n".join(lines)
