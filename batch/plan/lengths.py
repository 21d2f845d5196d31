"""How long a job's sequences are: as far as it is known before a worker starts, its engine's limits follow from it."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from moray.batch.ledger import Counts
from moray.batch.spec import JobSpec
from moray.engine.config import EngineConfig
from moray.engine.core.step_limits import mean_cached_tokens

NOTHING: Mapping[int, Counts] = MappingProxyType({})


def engine_config_after(spec: JobSpec, committed: Mapping[int, Counts]) -> EngineConfig:
    """Return the engine's config of a job, with the lengths of the rows that are done, if there are any.

    committed: counts of the shards that are done, by shard
    """
    config = spec.engine_config()
    ok = sum(counts.ok for counts in committed.values())
    if not ok:
        return config
    prompts = sum(counts.prompt_tokens for counts in committed.values()) / ok
    answers = sum(counts.generated_tokens for counts in committed.values()) / (ok * spec.sampling.n)
    return replace(config, mean_cached_tokens=mean_cached_tokens(prompts, answers))
