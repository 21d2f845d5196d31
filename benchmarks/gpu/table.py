"""Draw the results of all stages as tables: checks, engines beside their bounds and published figures, kernels."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu.anchors import ANCHORS, Anchor
from gpu.progress import Row, is_final, rows_of

NOTE = "**A dry run: tiny shapes on a CPU. The figures say nothing about speed; only that the script runs.**"


def write_tables(out: Path, stages: Sequence[str], context: dict[str, Any]) -> Path:
    """Write tables.md into the folder of the results, from what is there so far; return its path."""
    rows = {stage: rows_of(out, stage) for stage in stages}
    path = out / "tables.md"
    path.write_text("\n".join(_lines(rows, context)) + "\n")
    return path


def _lines(rows: dict[str, list[Row]], context: dict[str, Any]) -> Iterator[str]:
    is_dry = bool(context.get("dry_run"))
    card = (context.get("card") or {}).get("name", "no GPU")
    yield f"# {card}, commit {context.get('commit') or 'unknown'}, {context.get('date', '')}"
    yield from ("", NOTE) if is_dry else ()
    yield from _checks([row for stage in rows.values() for row in stage if "check" in row])
    engines = [row for stage in ("engine", "ranks", "peers") for row in rows.get(stage, ()) if "kind" in row]
    yield from _section(
        "Engines", "Bounds are those of a step with the experts that the routing used: gpu/roofline.py."
    )
    names = "engine", "model", "weights", "kind", "num_sequences", "tokens_per_s", "bound_tokens_per_s"
    yield from _table(engines, (*names, "percent_of_bound", "times bf16", "times plain", "times one rank"))
    if timed := [row for row in rows.get("ranks", ()) if "gather" in row]:
        yield from _section("Gathers among GPUs", "Microseconds of one in a CUDA graph; rows and columns of all ranks.")
        yield from _table(timed, ("gather", "ranks", "rows", "columns", "us", "equal", "mib"))
    if not is_dry:
        yield from _section("Beside published figures", "Conditions differ; ours is the fastest load of that model.")
        yield from _table(
            _beside(rows.get("engine", [])), ("model", "published", "ours", "load", "conditions", "source")
        )
    kernels = [row for row in rows.get("kernels", ()) if "rows" in row]
    peers = sorted({name for row in kernels for name in row if name.endswith(": times ours")})
    yield from _section("Kernels", "Microseconds; a bound is the larger of bytes and operations at the measured rates.")
    yield from _table(kernels, ("op", "rows", "us", "bound_us", "percent_of_bound", *peers))
    yield from _section("The pipeline", "What a job costs beside its engine alone.")
    yield from _table(rows.get("batch", []), ("batch", "rows", "engine_s", "job_work_s", "cost_percent", "same_tokens"))
    if missing := [(stage, row) for stage, of in rows.items() for row in of if not is_final(row)]:
        yield from _section("Not measured yet", "The same command goes on with them.")
        yield from (f"* {stage}: {_name(row)}" for stage, row in missing)


def _section(title: str, text: str) -> Iterator[str]:
    yield from ("", f"## {title}", "", text, "")


def _checks(rows: Sequence[Row]) -> Iterator[str]:
    counts = {name: sum(row.get("ok") is value for row in rows) for name, value in (("right", True), ("wrong", False))}
    yield from _section("Correctness", f"{counts['right']} checks are right, {counts['wrong']} wrong.")
    for row in rows:
        if row.get("ok") is False:
            yield f"* WRONG: {row['check']}: {row.get('raised') or row.get('error')} (limit {row.get('limit')})"


def _beside(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield each published figure with the fastest load of ours that it can be compared with."""
    measured = [row for row in rows if row.get("tokens_per_s")]
    for anchor in ANCHORS:
        ours = _fastest(measured, anchor)
        load = "" if ours is None else f"{ours['kind']}, {ours['num_sequences']} sequences, {ours['weights']}"
        yield {
            "model": anchor.model,
            "published": f"{anchor.tokens_per_s:,.0f} ({anchor.what})",
            "ours": None if ours is None else ours["tokens_per_s"],
            "load": load,
            "conditions": anchor.conditions,
            "source": anchor.source,
        }


def _fastest(rows: Sequence[Row], anchor: Anchor) -> Row | None:
    """Return our row: of a mixed load, which includes prompts as the published figures do, if there is one."""
    for weights in anchor.weights:
        found = [row for row in rows if row["model"] == anchor.model and row.get("weights") == weights]
        if found:
            return max(found, key=lambda row: (row["kind"] == "mixed", row["tokens_per_s"]))
    return None


def _table(rows: Iterable[Row], names: Sequence[str]) -> Iterator[str]:
    """Yield a Markdown table, without the columns that no row has."""
    rows = list(rows)
    used = [name for name in names if any(row.get(name) is not None for row in rows)]
    if not used:
        yield "Nothing yet."
        return
    yield f"| {' | '.join(used)} |"
    yield f"|{'---|' * len(used)}"
    for row in rows:
        cells = [_cell(row.get(name)) for name in used]
        if row.get("error"):
            cells[-1] = f"{cells[-1]} {str(row['error'])[:80]}".strip()
        yield f"| {' | '.join(cells)} |"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "/")


def _name(row: Row) -> str:
    names = "check", "op", "engine", "gather", "ranks", "model", "batch", "kind", "num_sequences"
    return ", ".join(str(row[name]) for name in names if name in row)
