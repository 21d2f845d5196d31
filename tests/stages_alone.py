"""A job's stages one after the other, in this process: the parts of a job, without Ray."""

from pathlib import Path

import pyarrow as pa
from made_jobs import TINY

from moray.batch.input.reader import ShardReader
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import PLAN
from moray.batch.plan.planner import plan_job
from moray.batch.spec import JobSpec
from moray.batch.stages.commit import Commit
from moray.batch.stages.generate import Generate
from moray.batch.stages.prepare import Prepare
from moray.batch.stages.prompts import Prompts
from moray.batch.worker.shard_executor import ShardExecutor
from moray.engine.engine import Engine
from moray.engine.text.tokenizer import Tokenizer


def run_alone(spec: JobSpec, engine: Engine) -> Path:
    """Write the parts and the plan of a job, and return its output folder."""
    job = plan_job(spec)
    files, tokenizer = job.input, Tokenizer(TINY, special_tokens=spec.kept_tokens)
    kept = pa.schema([files.output_schema.field(name) for name in files.kept_columns])
    reader = ShardReader(files.filesystem, files.root, files.read_columns, files.output_schema)
    longest = job.config.max_position_embeddings
    prepare = Prepare(spec, reader, Prompts(spec, tokenizer, job.config.vocab_size), kept, longest)
    executor = ShardExecutor(lambda: engine, lambda rows, is_trial: None, lambda shard, row: None)
    generate = Generate(executor, lambda shard: {})
    commit = Commit(
        spec.output.path,
        files.output_schema,
        job.plan.fingerprint.hexdigest,
        {},
        tokenizer,
        parsed_type=spec.parsed_type,
        choices=spec.choices,
        is_structured=spec.is_structured,
    )
    OutputFolder(spec.output.path).write(PLAN, job.plan.to_json().encode())
    for shard in job.plan.shards:
        commit(generate(prepare.block(shard, job.plan.part_name(shard))))
    executor.fail(RuntimeError("the test is over"))
    executor.join(60)
    return Path(spec.output.path)
