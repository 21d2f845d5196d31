"""InFlightShard: one shard that a worker is running, with its rows and their results so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event

from moray.batch.ledger import Progress
from moray.batch.worker.quarantine import Suspect
from moray.engine.errors import JobError
from moray.engine.request import Completion, Request


@dataclass(frozen=True, slots=True)
class InFlightRow:
    """Holds a row that is ready for the engine.

    index:    its place in the shard's block
    request:  what the engine gets, without an id: the row gets one when it enters the engine
    """

    index: int
    request: Request


@dataclass
class InFlightShard:
    """Holds a shard that the engine is running.

    index:        the shard's number in the plan
    completions:  row's index -> its samples, in order; a row that did not run to its end has one, with an error
    latencies_s:  row's index -> seconds from its admission into the engine to its end
    prompt_tokens, generated_tokens:  progress: tokens of the rows that have entered the engine so far, and of copies
    num_copied:   rows that have the answer of an equal row
    engine_s:     the shard's share of the time that the engine was busy
    done:         set when every row is finished, or the engine has failed
    failure:      what the engine failed with
    suspects:     row's index -> Suspect, for the rows that may have crashed a worker
    """

    index: int
    rows: Sequence[InFlightRow]
    completions: dict[int, list[Completion]] = field(default_factory=dict)
    latencies_s: dict[int, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    num_copied: int = 0
    engine_s: float = 0.0
    done: Event = field(default_factory=Event)
    failure: BaseException | None = None
    suspects: Mapping[int, Suspect] = field(default_factory=dict)

    @property
    def progress(self) -> Progress:
        return Progress(self.index, len(self.completions), self.prompt_tokens, self.generated_tokens)

    def wait(self) -> None:
        """Wait for the shard's end. Raises JobError where the engine failed."""
        self.done.wait()
        if self.failure is not None:
            raise JobError(f"the engine failed: {type(self.failure).__name__}: {self.failure}") from self.failure
