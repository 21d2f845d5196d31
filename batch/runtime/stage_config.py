"""StageConfig: what the actors of all stages are made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
from pyarrow import fs

from moray.batch.forecast.sample_plan import SamplePlan
from moray.batch.input.layout import Layout
from moray.batch.ledger import Counts
from moray.batch.output.folder import OutputFolder
from moray.batch.plan.lengths import NOTHING, engine_config_for
from moray.batch.plan.planner import PlannedJob
from moray.batch.plan.provenance import describe_origin, pinned_path
from moray.batch.plan.resources import Resources
from moray.batch.spec import JobSpec
from moray.engine.config import EngineConfig


@dataclass(frozen=True)
class StageConfig:
    """Holds what the stages need to know about the job; small, because it is sent to every actor.

    model_path:    the model's path, with the revision that the job was planned with
    engine:        the configuration of a worker's engine
    filesystem:    where the input is
    input_root:    the input's path in that filesystem
    input_layout:  how its files hold their rows
    read_columns:  input columns that the spec reads
    kept:          input columns to carry through, with their types
    schema:        schema of the parts
    output:        path of the output folder
    fingerprint:   the job's fingerprint, in hexadecimal digits
    provenance:    metadata that is written into every part
    monitor:       name of the job's monitor actor
    merges:        True where shards hold some rows of parts that exist
    sample_plan:   the rows to read for the forecast; None where none is wanted
    """

    spec: JobSpec
    model_path: str
    engine: EngineConfig
    filesystem: fs.FileSystem
    input_root: str
    input_layout: Layout
    read_columns: Sequence[str]
    kept: pa.Schema
    schema: pa.Schema
    output: str
    fingerprint: str
    provenance: Mapping[str, object]
    monitor: str
    merges: bool
    sample_plan: SamplePlan | None

    @classmethod
    def from_job(
        cls,
        job: PlannedJob,
        run: str,
        resources: Resources,
        sample_plan: SamplePlan | None = None,
        *,
        committed: Mapping[int, Counts] = NOTHING,
        merges: bool,
    ) -> "StageConfig":
        """Return the configuration of a job's stages.

        committed: counts of the shards that are done, by shard: later rows are likely to be as long

        Paths become absolute, because actors run in folders of their own.
        """
        spec, files = job.spec, job.input
        folder = OutputFolder(spec.output.path)
        device = "cuda" if resources.worker.gpus else "cpu"
        return cls(
            spec=spec,
            model_path=pinned_path(job.model),
            engine=replace(engine_config_for(spec, committed), num_threads=resources.threads, device=device),
            filesystem=files.filesystem,
            input_root=files.root,
            input_layout=files.layout,
            read_columns=files.read_columns,
            kept=pa.schema([files.output_schema.field(name) for name in files.kept_columns]),
            schema=files.output_schema,
            output=folder.root if folder.is_local else spec.output.path,
            fingerprint=job.plan.fingerprint.hexdigest,
            provenance=describe_origin(job, run),
            monitor=f"moray-{run}",
            merges=merges,
            sample_plan=sample_plan,
        )
