"""Describe a plan as JSON values: what a run of the spec would do, and its memory, time and cost."""

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from moray.batch.forecast.forecast import cost_of
from moray.batch.forecast.job_forecast import ForecastOptions, choose_workers, forecast_job, sample_job
from moray.batch.forecast.sample import PromptSample, histogram, percentile
from moray.batch.ledger import Counts
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import check_folder
from moray.batch.output.part import find_committed
from moray.batch.plan.gpus import fit_job
from moray.batch.plan.model_fit import explain_misfits
from moray.batch.plan.planner import PlannedJob, tokens_per_row
from moray.engine.core.memory_fit import MemoryFit
from moray.engine.errors import Problem, SpecError


def describe(
    job: PlannedJob,
    options: ForecastOptions | None = None,
    gpus: Sequence[str] = (),
    numbers: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the plan as JSON values.

    options:  what the forecast is for
    gpus:     GPU models for the table of memory; empty = those of the spec
    numbers:  numbers of GPUs of a worker for that table; empty = the spec's

    Raises UserError where the output folder belongs to another job, or where the model does not fit into the one GPU
    that is named.
    """
    options = options or ForecastOptions()
    spec, plan = job.spec, job.plan
    folder = OutputFolder(spec.output.path)
    check_folder(folder, plan)
    committed = find_committed(folder, plan)
    fits = fit_job(spec, job.config, job.model_info, gpus, numbers, committed)
    if len(gpus) == 1 and len(numbers) < 2 and not any(fit.fits for fit in fits):
        message = fits[0].explain() if len(fits) == 1 else explain_misfits(fits)
        raise SpecError([Problem(f"--gpu {gpus[0]}", message)])
    sample = sample_job(job)
    return {
        "name": spec.name,
        "task": spec.task,
        "choices": list(spec.choices),
        "input": _input(job),
        "model": {"path": spec.model.path, **asdict(job.model_info)},
        "max_model_len": spec.model.max_model_len or job.model_info.max_position_embeddings,
        "shards": len(plan.shards),
        "shard_rows": max((shard.num_rows for shard in plan.shards), default=0),
        "max_generated_tokens": plan.num_rows * tokens_per_row(spec),
        "rows_set_max_tokens": "max_tokens" in spec.sampling.columns or "n" in spec.sampling.columns,
        "sample": _sample(sample),
        "forecast": _forecast(job, sample, folder, committed, options),
        "memory": [_memory(fit, sample) for fit in fits],
        "output": {
            "path": spec.output.path,
            "parts": f"part-{plan.fingerprint.short}-*.parquet",
            "columns": {field.name: str(field.type) for field in job.input.output_schema},
        },
        "warnings": [*plan.warnings, *sample.warnings],
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


def _sample(sample: PromptSample) -> dict[str, Any]:
    lengths = sample.lengths
    return {
        "rows": len(sample.rows),
        "is_whole": sample.is_whole,
        "reach": sample.scanned_fraction,
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
    job: PlannedJob, sample: PromptSample, folder: OutputFolder, committed: dict[int, Counts], options: ForecastOptions
) -> dict[str, Any]:
    """Return the forecast that a run writes, with its workers, and the cost if every row generates all it may."""
    pool = choose_workers(job, sample, folder, committed, options)
    forecast = forecast_job(job, sample, folder, committed, options)
    tokens = forecast.prompt_tokens if job.spec.is_scoring else forecast.generated_tokens
    at_most = zip(("seconds", "card_hours", "price"), cost_of(tokens.high, pool, options.price), strict=True)
    return asdict(forecast) | {"workers": pool.workers, "gpus": pool.gpus, "at_most": dict(at_most)}


def _memory(fit: MemoryFit, sample: PromptSample) -> dict[str, Any]:
    """Return the memory of one GPU; where a worker has several, that of each.

    In it, "sequences" is how many run at once if all were as long as the mean or the longest one of the sample, or as
    the context.
    """
    lengths = sample.sequences
    return {
        "name": fit.name,
        "gpus": fit.num_gpus,
        "memory_bytes": fit.memory_bytes,
        "weights_bytes": fit.weights_bytes,
        "working_bytes": fit.working_bytes,
        "cache_bytes": fit.cache_bytes,
        "cache_tokens": fit.cache_tokens,
        "max_num_seqs": fit.limits.max_num_seqs if fit.limits else 0,
        "max_num_batched_tokens": fit.limits.max_num_batched_tokens if fit.limits else 0,
        "sequences": {
            "mean_tokens": round(fmean(lengths)),
            "of_mean": fit.sequences(round(fmean(lengths))),
            "longest_tokens": lengths[-1],
            "of_longest": fit.sequences(lengths[-1]),
            "context_tokens": fit.max_model_len,
            "of_context": fit.sequences(fit.max_model_len),
        }
        if lengths
        else None,
        "runs": fit.refusal is None,
        "fits": fit.fits,
        "why_not": None if fit.fits else fit.explain(),
    }
