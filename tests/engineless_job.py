"""Runs a job through its real stages in this process, without Ray and without its model: every sample is one token."""

from collections.abc import Sequence

import pyarrow as pa
from made_jobs import TINY

from moray.batch.input.reader import ShardReader
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import claim_folder
from moray.batch.plan.planner import PlannedJob, plan_job
from moray.batch.shards import Shard
from moray.batch.spec import JobSpec
from moray.batch.stages.commit import Commit
from moray.batch.stages.prepare import Prepare
from moray.batch.stages.prompts import Prompts
from moray.batch.stages.results import build_result_block, read_rows
from moray.batch.worker.in_flight_shard import InFlightShard
from moray.engine.request import Completion
from moray.engine.text.tokenizer import Tokenizer

TOKEN = 300


def run_engineless(spec: JobSpec, shards: Sequence[Shard] | None = None) -> PlannedJob:
    """Publish the parts of some shards, or of all, and return the job."""
    job = plan_job(spec)
    files, plan, tokenizer = job.input, job.plan, Tokenizer(TINY)
    kept = pa.schema([files.output_schema.field(name) for name in files.kept_columns])
    reader = ShardReader(files.filesystem, files.root, files.read_columns, files.output_schema, files.layout)
    reader.expect(plan.fingerprint.files)
    prepare = Prepare(spec, reader, Prompts(spec, tokenizer, 2000), kept, 2000)
    commit = Commit(spec.output.path, files.output_schema, plan.fingerprint.hexdigest, {}, tokenizer)
    claim_folder(OutputFolder(spec.output.path), spec, plan)
    for shard in plan.shards if shards is None else shards:
        block = prepare.block(shard, plan.part_name(shard))
        rows = list(read_rows(block))
        done = {row.index: [Completion((TOKEN,), "length", 4)] * row.request.num_samples for row in rows}
        commit(build_result_block(block, InFlightShard(shard.index, rows, done, dict.fromkeys(done, 0.1))))
    return job
