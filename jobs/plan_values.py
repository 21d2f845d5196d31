"""`moray plan` as data: what a run of the spec would do, and what that will take."""

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from batch.forecast.forecast import cost_of
from batch.forecast.memory import MemoryFit
from batch.forecast.of_job import Wanted, choose_crew, fit_cards, forecast_job, sample_job
from batch.forecast.sample import Sample, histogram, percentile
from batch.ledger import Counts
from batch.output.folder import OutputFolder
from batch.output.job_folder import check_folder
from batch.output.part import find_committed
from batch.planning.planner import PlannedJob, tokens_per_row
from engine.errors import Problem, SpecError


def describe(job: PlannedJob, wanted: Wanted | None = None, cards: Sequence[str] = ()) -> dict[str, Any]:
    """The plan as JSON values.

    cards: to look at; the forecast is for wanted.card

    Raises UserError where the output folder does not fit, or the model does not fit into the one card named.
    """
    wanted = wanted or Wanted()
    spec, plan = job.spec, job.plan
    folder = OutputFolder(spec.output.path)
    check_folder(folder, plan)
    committed = find_committed(folder, plan)
    fits = fit_cards(job, cards)
    if len(cards) == 1 and not fits[0].fits:
        raise SpecError([Problem(f"--card {cards[0]}", fits[0].explain())])
    sample = sample_job(job)
    return {
        "name": spec.name,
        "task": spec.task,
        "input": _input(job),
        "model": {"path": spec.model.path, **asdict(job.facts)},
        "max_model_len": spec.model.max_model_len or job.facts.max_position_embeddings,
        "shards": len(plan.shards),
        "shard_rows": max((shard.num_rows for shard in plan.shards), default=0),
        "max_generated_tokens": plan.num_rows * tokens_per_row(spec),
        "rows_set_max_tokens": "max_tokens" in spec.sampling.columns or "n" in spec.sampling.columns,
        "sample": _sample(sample),
        "forecast": _forecast(job, sample, folder, committed, wanted),
        "memory": [_memory(fit, sample) for fit in fits],
        "output": {
            "path": spec.output.path,
            "parts": f"part-{plan.fingerprint.short}-*.parquet",
            "columns": {field.name: str(field.type) for field in job.input.output_schema},
        },
        "fingerprint": plan.fingerprint.hexdigest,
        "committed": {
            "shards": len(committed),
            "rows": sum(counts.rows for counts in committed.values()),
            "failed_rows": sum(counts.failed for counts in committed.values()),
        },
    }


def _input(job: PlannedJob) -> dict[str, Any]:
    spec, files = job.spec, job.input
    return {
        "path": spec.input.path,
        "files": len(files.files),
        "bytes": sum(file.size for file in files.files),
        "rows": job.plan.num_rows,
        "read_columns": list(files.read_columns),
        "kept_columns": list(files.kept_columns),
        "continuation": spec.input.continuation,
    }


def _sample(sample: Sample) -> dict[str, Any]:
    lengths = sample.lengths
    return {
        "rows": len(sample.rows),
        "is_whole": sample.is_whole,
        "reach": sample.reach,
        "prompt_tokens": {
            "mean": round(fmean(lengths), 1),
            "median": percentile(lengths, 0.5),
            "p95": percentile(lengths, 0.95),
            "longest": lengths[-1],
        }
        if lengths
        else None,
        "histogram": [asdict(bucket) for bucket in histogram(lengths)],
        "errors": sample.errors,
        "null_rows": sum(count for code, count in sample.errors.items() if code in ("null_input", "null_column")),
        "too_long_rows": sample.errors.get("too_long", 0),
        "duplicate_rows": sample.duplicates,
        "shared_prefix_tokens": sample.shared_prefix,
    }


def _forecast(
    job: PlannedJob, sample: Sample, folder: OutputFolder, committed: dict[int, Counts], wanted: Wanted
) -> dict[str, Any]:
    """As the run writes it, with who it is for, and what it comes to if every row takes all that it may."""
    crew = choose_crew(job, sample, folder, committed, wanted)
    forecast = forecast_job(job, sample, folder, committed, wanted)
    tokens = forecast.prompt_tokens if job.spec.task == "score" else forecast.generated_tokens
    at_most = zip(("seconds", "card_hours", "price"), cost_of(tokens.high, crew, wanted.price), strict=True)
    return asdict(forecast) | {"workers": crew.workers, "gpus": crew.gpus, "at_most": dict(at_most)}


def _memory(fit: MemoryFit, sample: Sample) -> dict[str, Any]:
    """sequences: that run at once, if all were as long as the mean one or the longest one of the sample"""
    lengths = sample.sequences
    return {
        "name": fit.name,
        "memory_bytes": fit.memory_bytes,
        "weights_bytes": fit.weights_bytes,
        "working_bytes": fit.working_bytes,
        "cache_bytes": fit.cache_bytes,
        "cache_tokens": fit.cache_tokens,
        "max_num_seqs": fit.limits.max_num_seqs if fit.limits else 0,
        "sequences": {
            "mean_tokens": round(fmean(lengths)),
            "of_mean": fit.sequences(round(fmean(lengths))),
            "longest_tokens": lengths[-1],
            "of_longest": fit.sequences(lengths[-1]),
        }
        if lengths
        else None,
        "fits": fit.fits,
        "why_not": None if fit.fits else fit.explain(),
    }
