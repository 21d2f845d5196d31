"""How long a job's sequences are: as far as it is known before a worker starts, its engine's limits follow from it."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from moray.batch.ledger import Counts
from moray.batch.spec import JobSpec
from moray.engine.config import EngineConfig
from moray.engine.core.step_limits import OUTPUT_TOKENS, PROMPT_TOKENS, mean_cached_tokens

NOTHING: Mapping[int, Counts] = MappingProxyType({})


def engine_config_for(spec: JobSpec, committed: Mapping[int, Counts] = NOTHING) -> EngineConfig:
    """Return the engine's config of a job, with the lengths of its sequences as far as they are known.

    Those of rows that are done, if there are any. Before that no row has been read, and a prompt counts as long as that
    of a job of which nothing is known.

    committed: counts of the shards that are done, by shard
    """
    ok = sum(counts.ok for counts in committed.values())
    if ok:
        prompts = sum(counts.prompt_tokens for counts in committed.values()) / ok
        answers = sum(counts.generated_tokens for counts in committed.values()) / (ok * spec.sampling.n)
    else:
        prompts, answers = PROMPT_TOKENS, _expected_tokens(spec)
    return replace(spec.engine_config(), mean_cached_tokens=mean_cached_tokens(prompts, answers))


def _expected_tokens(spec: JobSpec) -> int:
    """Return the tokens of an answer where no answer has been seen: as many as it may have, if the spec says so."""
    if spec.is_scoring:
        return 0
    return OUTPUT_TOKENS if "max_tokens" in spec.sampling.columns else spec.sampling.max_tokens
