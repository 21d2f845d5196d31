"""EqualRows: finds rows whose answer must be that of another row, which is computed once. Pure."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum, auto
from hashlib import blake2b
from typing import NamedTuple

from moray.batch.worker.in_flight_shard import InFlightRow, InFlightShard
from moray.engine.params import SamplingParams
from moray.engine.request import Completion, Request

MAX_KEPT_TOKENS = 1_000_000  # of the answers that are kept for rows to come: some 100 MB at most
ANSWER_TOKENS = 16  # that an answer counts in addition, for the objects that hold it
LOGPROB_TOKENS = 8  # that one entry of logprobs counts

Key = bytes
Row = tuple[InFlightShard, InFlightRow]


class Turn(Enum):
    """Says which of two equal rows is computed."""

    THIS = auto()
    OTHER = auto()


class Answer(NamedTuple):
    """Holds what a row got.

    completions:  its samples, none of them with an error
    latency_s:    seconds from its admission into the engine to its end
    """

    completions: list[Completion]
    latency_s: float

    @property
    def size(self) -> int:
        """Return how much memory the answer takes, in tokens."""
        size = 0
        for done in self.completions:
            entries = [entry for kept in (done.logprobs, done.prompt_logprobs) for entry in kept or () if entry]
            size += ANSWER_TOKENS + len(done.token_ids) + len(done.prompt_logprobs or ())
            size += sum(LOGPROB_TOKENS * (1 + len(entry.top)) for entry in entries)
        return size


class EqualRows:
    """Groups rows with equal prompts, continuations and sampling parameters, where nothing in them is random.

    The first row of a group is computed. The others wait for its answer, or get it at once if it is still kept. Rows
    with a temperature are never equal: each has a random stream of its own.

    max_kept_tokens:  size of the answers that are kept; those used longest ago are dropped first
    """

    def __init__(self, max_kept_tokens: int = MAX_KEPT_TOKENS) -> None:
        self._max_kept_tokens = max_kept_tokens
        self._kept: OrderedDict[Key, Answer] = OrderedDict()
        self._kept_tokens = 0
        self._waiting: dict[Key, list[Row]] = {}  # of each group that is being computed, the rows that wait for it
        self._computed: dict[tuple[int, int], Key] = {}  # the rows that are being computed; see _name
        self._digests: dict[int, tuple[SamplingParams, bytes]] = {}  # id of parameters -> themselves, their digest

    def add(self, shard: InFlightShard, row: InFlightRow) -> Answer | Turn:
        """Return the answer of an equal row, if one is kept, else whose turn it is to be computed.

        Turn.OTHER: an equal row is being computed, and `finish` returns this row when that one is done.
        Turn.THIS: there is none; this row is to be computed, and others will wait for it.
        """
        key = self._key(row.request)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key in self._waiting:
            self._waiting[key].append((shard, row))
            return Turn.OTHER
        if key:
            self._waiting[key] = []
            self._computed[_name(shard, row)] = key
        return Turn.THIS

    def finish(self, shard: InFlightShard, row: InFlightRow, answer: Answer) -> list[Row]:
        """Take the answer of a row, and return the rows that have waited for it; none where the row is equal to none.

        An answer with an error is not kept: it may be that row's alone, as that of a time limit is.
        """
        key = self._computed.pop(_name(shard, row), None)
        if key is None:
            return []
        if all(done.error is None for done in answer.completions):
            self._keep(key, answer)
        return self._waiting.pop(key)

    def _keep(self, key: Key, answer: Answer) -> None:
        self._kept[key] = answer
        self._kept_tokens += answer.size
        while self._kept_tokens > self._max_kept_tokens:
            _, dropped = self._kept.popitem(last=False)
            self._kept_tokens -= dropped.size

    def _key(self, request: Request) -> Key:
        """Return what equal rows have in common; an empty key for a row that no other one can equal."""
        params = request.params
        if not (params.is_greedy or params.max_tokens == 0 or request.continuations):
            return b""
        digest = blake2b(self._params_digest(params), digest_size=16)
        for token_ids in (request.prompt_token_ids, *request.continuations):
            digest.update(len(token_ids).to_bytes(8, "little"))
            digest.update(_to_bytes(token_ids))
        return digest.digest()

    def _params_digest(self, params: SamplingParams) -> bytes:
        """Return a digest of what matters in parameters without chance: all but the seed."""
        known = self._digests.get(id(params))
        if known is None:
            if len(self._digests) >= 1000:
                self._digests.clear()
            text = repr(replace(params, seed=0))
            known = self._digests[id(params)] = params, blake2b(text.encode(), digest_size=16).digest()
        return known[1]


def _name(shard: InFlightShard, row: InFlightRow) -> tuple[int, int]:
    return id(shard), row.index


def _to_bytes(token_ids: Sequence[int]) -> bytes:
    return array("q", token_ids).tobytes()
