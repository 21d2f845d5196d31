"""`moray plan`: what a run of the spec would do, as data and as drawn."""

from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from batch.model_facts import ModelFacts
from batch.output.folder import OutputFolder
from batch.output.job_folder import check_folder
from batch.output.part import find_committed
from batch.planner import PlannedJob, tokens_per_row
from batch.quantities import count, short, size


def describe(job: PlannedJob) -> dict[str, Any]:
    """The plan as JSON values. Raises UserError where the output folder does not fit."""
    spec, plan, facts = job.spec, job.plan, job.facts
    folder = OutputFolder(spec.output.path)
    check_folder(folder, plan)
    committed = find_committed(folder, plan)
    return {
        "name": spec.name,
        "task": spec.task,
        "input": {
            "path": spec.input.path,
            "files": len(job.input.files),
            "bytes": sum(file.size for file in job.input.files),
            "rows": plan.num_rows,
            "read_columns": list(job.input.read_columns),
            "kept_columns": list(job.input.kept_columns),
            "continuation": spec.input.continuation,
        },
        "model": {"path": spec.model.path, **asdict(facts)},
        "max_model_len": spec.model.max_model_len or facts.max_position_embeddings,
        "shards": len(plan.shards),
        "shard_rows": max((shard.num_rows for shard in plan.shards), default=0),
        "max_generated_tokens": plan.num_rows * tokens_per_row(spec),
        "rows_set_max_tokens": "max_tokens" in spec.sampling.columns or "n" in spec.sampling.columns,
        "output": {
            "path": spec.output.path,
            "parts": f"part-{plan.fingerprint.short}-*.parquet",
            "columns": job.input.output_schema.names,
        },
        "fingerprint": plan.fingerprint.hexdigest,
        "committed": {
            "shards": len(committed),
            "rows": sum(counts.rows for counts in committed.values()),
            "failed_rows": sum(counts.failed for counts in committed.values()),
        },
    }


def draw(plan: dict[str, Any]) -> Group:
    """What describe() gives, for a terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _lines(plan):
        table.add_row(name, Text(text))
    return Group(Text(plan["name"], style="bold cyan"), table)


def _lines(plan: dict[str, Any]) -> list[tuple[str, str]]:
    source, output, done = plan["input"], plan["output"], plan["committed"]
    paths = source["path"] if isinstance(source["path"], str) else ", ".join(source["path"])
    facts = {name: value for name, value in plan["model"].items() if name != "path"}
    bound = "about" if plan["rows_set_max_tokens"] else "at most"
    work = f"{bound} {count(plan['max_generated_tokens'], 'token')} to generate"
    if plan["task"] == "score":
        work = f"continuations in {source['continuation']} to score"
    return [
        (
            "Input",
            f"{paths}: {count(source['rows'], 'row')} in {count(source['files'], 'file')}, {size(source['bytes'])}",
        ),
        ("", f"reads {', '.join(source['read_columns'])}; keeps {', '.join(source['kept_columns']) or 'none'}"),
        ("Model", f"{plan['model']['path']}: {_model_line(ModelFacts(**facts))}"),
        ("", f"{size(facts['cache_token_bytes'])} of KV cache a token, context {plan['max_model_len']:,}"),
        (
            "Work",
            f"{count(plan['shards'], 'shard')} of {plan['shard_rows']} rows, {work}",
        ),
        ("Output", f"{output['path']}/{output['parts']}"),
        ("", ", ".join(output["columns"])),
        ("Done", _done_line(plan, done)),
    ]


def _model_line(facts: ModelFacts) -> str:
    return (
        f"{facts.architecture}, {short(facts.num_parameters)} parameters, "
        f"{facts.num_experts_per_tok} of {facts.num_experts} experts a token, "
        f"{size(facts.weights_bytes)} as {facts.dtype}"
    )


def _done_line(plan: dict[str, Any], done: dict[str, int]) -> str:
    if plan["shards"] == 0:
        return "the input has no rows"
    if done["shards"] == 0:
        return "nothing yet"
    failed = f" ({count(done['failed_rows'], 'row')} with an error)" if done["failed_rows"] else ""
    if done["shards"] == plan["shards"]:
        return f"all {count(done['rows'], 'row')}{failed}; a run would do nothing"
    return (
        f"{done['shards']} of {count(plan['shards'], 'shard')}, {done['rows']:,} of "
        f"{count(plan['input']['rows'], 'row')}{failed}; a run continues from there"
    )
