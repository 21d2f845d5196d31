"""The stages beside Worker as Ray Data runs them: actors that build what prepare and commit need, once."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory

import pyarrow as pa
from pyarrow import fs

from batch.faults.patience import StoreError, patiently
from batch.forecast.draw import Draw
from batch.forecast.take import take_sample
from batch.input.reader import ShardReader
from batch.output.folder import OutputFolder
from batch.output.job_folder import check_seen
from batch.planning.plan import Plan, Shard
from batch.planning.planner import PlannedJob
from batch.spec import JobSpec
from batch.stages.commit import Commit
from batch.stages.prepare import Prepare
from batch.stages.prompts import Prompts
from batch.stages.rows import PREPARED
from batch.stages.stage import Stage
from engine.checkpoint.model_config import read_model_config
from engine.errors import InputError
from engine.remote import ModelFolder
from engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Setup:
    """What the stages are told about the job; small, since it goes to every actor.

    model_path:   with the revision that the job was planned with
    input_root:   in the filesystem
    kept:         input columns to carry through, with their types
    schema:       of the parts
    provenance:   written into every part
    monitor:      name of the Monitor actor
    merges:       shards hold some rows of parts that are there
    draw:         rows for the forecast, where it is wanted
    """

    spec: JobSpec
    model_path: str
    filesystem: fs.FileSystem
    input_root: str
    read_columns: Sequence[str]
    kept: pa.Schema
    schema: pa.Schema
    output: str
    fingerprint: str
    provenance: Mapping[str, object]
    monitor: str
    merges: bool
    draw: Draw | None

    @classmethod
    def of(cls, job: PlannedJob, run: str, draw: Draw | None = None, *, merges: bool) -> "Setup":
        """Paths become absolute: actors run in folders of their own."""
        spec, files = job.spec, job.input
        folder = OutputFolder(spec.output.path)
        model_path = _pin(job.model)
        return cls(
            spec=spec,
            model_path=model_path,
            filesystem=files.filesystem,
            input_root=files.root,
            read_columns=files.read_columns,
            kept=pa.schema([files.output_schema.field(name) for name in files.kept_columns]),
            schema=files.output_schema,
            output=folder.root if folder.is_local else spec.output.path,
            fingerprint=job.plan.fingerprint.hexdigest,
            provenance={
                "moray": version("moray"),
                "run": run,
                "model": model_path,
                "spec": spec.model_dump(mode="json"),
            },
            monitor=f"moray-{run}",
            merges=merges,
            draw=draw,
        )


def _pin(model: ModelFolder) -> str:
    """The model's path, at the revision it has now."""
    if "://" not in model.path:
        return str(Path(model.path).expanduser().resolve())
    return model.path if model.revision is None else f"{model.path.split('@')[0]}@{model.revision}"


class PrepareStage:
    """A shard in (a row with `item`, what `pack` made), its block out; an empty one once the job is being stopped."""

    def __init__(self, setup: Setup) -> None:
        self._stage = Stage(setup.monitor, "prepare")
        self._reader = ShardReader(setup.filesystem, setup.input_root, setup.read_columns, setup.schema)
        with self._stage.telling(), _side_files(setup.model_path) as folder:
            _check_input(setup)
            config, tokenizer = read_model_config(folder), Tokenizer(folder)
            self._prepare = Prepare(
                setup.spec,
                self._reader,
                Prompts(setup.spec, tokenizer, config.vocab_size),
                setup.kept,
                max_model_len=setup.spec.model.max_model_len or config.max_position_embeddings,
            )
        self._stage.ready()
        if (draw := setup.draw) is not None:
            where = setup.filesystem, setup.input_root
            self._stage.sample(lambda: take_sample(draw, setup.spec, *where, tokenizer, config))

    def __call__(self, item: pa.Table) -> pa.Table:
        assert item.num_rows == 1, f"{item.num_rows} shards came in one block"
        with self._stage.telling():
            if not self._stage.is_open():
                return PREPARED.empty_table()
            shard, part, identities = unpack(item["item"][0].as_py())
            self._reader.expect(identities)
            return patiently(lambda: self._prepare.block(shard, part), StoreError)


class CommitStage:
    def __init__(self, setup: Setup) -> None:
        self._stage = Stage(setup.monitor, "commit")
        with self._stage.telling(), _side_files(setup.model_path) as folder:
            check_seen(OutputFolder(setup.output), setup.fingerprint)
            tokenizer = Tokenizer(folder)
            self._commit = Commit(
                setup.output, setup.schema, setup.fingerprint, setup.provenance, tokenizer, merges=setup.merges
            )
        self._stage.ready()

    def __call__(self, block: pa.Table) -> pa.Table:
        with self._stage.telling():
            return self._commit(block)


def _check_input(setup: Setup) -> None:
    """Raises InputError on a machine that does not have a local input: each of its rows would become an error row."""
    if isinstance(setup.filesystem, fs.LocalFileSystem) and not Path(setup.input_root).exists():
        raise InputError(
            f"{setup.input_root} is not there on {gethostname()}; give an address such as s3://bucket/folder, or a "
            "path on a disk that every node of the cluster shares."
        )


Item = tuple[Shard, str, Mapping[str, str]]  # the shard, its part's name, its files as they were planned


def pack(shard: Shard, plan: Plan) -> bytes:
    files = {piece.file: plan.fingerprint.files[piece.file] for piece in shard.slices}
    return pickle.dumps((shard, plan.part_name(shard), files))


def unpack(item: bytes) -> Item:
    found: Item = pickle.loads(item)
    return found


@contextmanager
def _side_files(model_path: str) -> Iterator[Path]:
    """A local folder with the model's config and tokenizer, to be loaded."""
    with TemporaryDirectory(prefix="moray-") as parent:
        yield ModelFolder(model_path).side_folder(Path(parent))
