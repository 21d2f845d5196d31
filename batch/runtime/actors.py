"""The actors of the stages prepare and commit, as Ray Data runs them; each builds what its stage needs, once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory

import pyarrow as pa
from pyarrow import fs

from moray.batch.forecast.collect_sample import collect_sample
from moray.batch.input.reader import ShardReader
from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import check_visible
from moray.batch.runtime.monitor_client import MonitorClient
from moray.batch.runtime.stage_config import StageConfig
from moray.batch.stages.block_schemas import PREPARED
from moray.batch.stages.commit import Commit
from moray.batch.stages.prepare import Prepare
from moray.batch.stages.prompts import Prompts
from moray.batch.stages.shard_item import ShardItem
from moray.engine.checkpoint.model_config import read_model_config
from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.errors import InputError
from moray.engine.text.tokenizer import Tokenizer
from moray.engine.text.without_torch import do_without_torch


class PrepareActor:
    """Runs Prepare: a call gets the block of one ShardItem; once the job is being stopped it returns an empty block."""

    def __init__(self, config: StageConfig) -> None:
        do_without_torch()
        self._monitor = MonitorClient(config.monitor, "prepare")
        location = config.filesystem, config.input_root
        layout = config.input_layout
        with self._monitor.starting(), _metadata_files(config.model_path) as folder:
            _check_input(config)
            model_config = read_model_config(folder)
            tokenizer = Tokenizer(folder, special_tokens=config.spec.kept_tokens)
            self._stage = Prepare(
                config.spec,
                ShardReader(*location, config.read_columns, config.schema, layout),
                Prompts(config.spec, tokenizer, model_config.vocab_size),
                config.kept,
                max_model_len=config.spec.model.max_model_len or model_config.max_position_embeddings,
            )
        self._monitor.ready()
        if (sample_plan := config.sample_plan) is not None:
            self._monitor.sample(
                lambda: collect_sample(sample_plan, config.spec, *location, layout, tokenizer, model_config)
            )

    def __call__(self, block: pa.Table) -> pa.Table:
        with self._monitor.report_errors():
            return self._stage(ShardItem.from_block(block)) if self._monitor.is_open() else PREPARED.empty_table()


class CommitActor:
    """Runs Commit: a call gets a block of the worker."""

    def __init__(self, config: StageConfig) -> None:
        do_without_torch()
        self._monitor = MonitorClient(config.monitor, "commit")
        with self._monitor.starting(), _metadata_files(config.model_path) as folder:
            check_visible(OutputFolder(config.output), config.fingerprint)
            self._stage = Commit(
                config.output,
                config.schema,
                config.fingerprint,
                config.provenance,
                Tokenizer(folder, special_tokens=config.spec.kept_tokens),
                merges=config.merges,
                markers=config.spec.markers,
                parsed_type=config.spec.parsed_type,
                choices=config.spec.choices,
                is_structured=config.spec.is_structured,
            )
        self._monitor.ready()

    def __call__(self, block: pa.Table) -> pa.Table:
        with self._monitor.report_errors():
            return self._stage(block)


def _check_input(config: StageConfig) -> None:
    """Raise InputError on a machine that does not have a local input: each of its rows would become an error row."""
    if isinstance(config.filesystem, fs.LocalFileSystem) and not Path(config.input_root).exists():
        raise InputError(
            f"{config.input_root} is not there on {gethostname()}; give an address such as s3://bucket/folder, "
            "or a path on a disk that every node of the cluster shares."
        )


@contextmanager
def _metadata_files(model_path: str) -> Iterator[Path]:
    """Yield a local folder with the model's config and tokenizer."""
    with TemporaryDirectory(prefix="moray-") as parent:
        yield ModelSource(model_path).metadata_folder(Path(parent))
