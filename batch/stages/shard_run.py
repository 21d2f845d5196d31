"""ShardRun: one shard on its way through a worker, with its rows and what came of them so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event

from batch.faults.quarantine import Suspect
from batch.ledger import Progress
from engine.errors import JobError
from engine.params import SamplingParams
from engine.request import Completion, Request


@dataclass(slots=True)
class Row:
    """A row that is ready for the engine.

    index:          its place in the shard's block
    continuations:  token ids to score after the prompt, each a sample
    """

    index: int
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    stream_key: int
    continuations: Sequence[Sequence[int]] = ()

    @property
    def num_samples(self) -> int:
        return len(self.continuations) or self.params.n

    def request(self, request_id: str) -> Request:
        return Request(request_id, self.prompt_token_ids, self.params, self.stream_key, self.continuations)


@dataclass
class ShardRun:
    """One shard on its way through the engine.

    completions:  row's index -> its samples, in order; a row that failed has one, with an error
    latencies_s:  row's index -> seconds from its admission into the engine to its end
    engine_s:     the shard's part of the time the engine was busy
    suspects:     by index, rows that may have ended a worker
    """

    shard: int
    rows: Sequence[Row]
    completions: dict[int, list[Completion]] = field(default_factory=dict)
    latencies_s: dict[int, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    engine_s: float = 0.0
    done: Event = field(default_factory=Event)
    failure: BaseException | None = None
    suspects: Mapping[int, Suspect] = field(default_factory=dict)

    @property
    def progress(self) -> Progress:
        return Progress(self.shard, len(self.completions), self.prompt_tokens, self.generated_tokens)

    def wait(self) -> None:
        """Wait for the shard's end. Raises JobError when the engine failed."""
        self.done.wait()
        if self.failure is not None:
            raise JobError(f"the engine failed: {type(self.failure).__name__}: {self.failure}") from self.failure
