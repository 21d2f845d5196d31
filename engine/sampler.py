"""Sampler: one token for every sequence of a step. Engine calls it with the step's logits.

In this order: logits, logit_bias, penalties, ban of stop tokens before min_tokens, temperature, top_k, top_p, min_p,
draw. A row's token and logprobs do not depend on the rows beside it, bit by bit. Logprobs are the model's: of the
logits before all this.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import RequestError
from engine.params import SamplingParams, find_unknown_tokens
from engine.request import TokenLogprobs
from engine.transfer import to_device
from kernels.cpu import sampling
from kernels.cpu.philox import uniform_bits

NO_TOKEN = -1
LEAST_TEMPERATURE = 1e-6  # far below what still lets anything but the best token be drawn


class SamplerRow:
    """One sample's state in the sampler: what it asks for and the tokens it has seen. Made by Sampler.new_row.

    prompt_token_ids: those that penalties fall on; empty where none do
    stop_token_ids:   tokens that end this sample: params.stop_token_ids and, unless ignore_eos, the model's
    num_generated:    tokens sampled so far, the position in the random stream
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        stop_token_ids: frozenset[int],
        stream_key: int,
        sample: int,
    ) -> None:
        self.params = params
        self.stop_token_ids = stop_token_ids
        self.stream_key = stream_key
        self.sample = sample
        self.num_generated = 0
        self.has_penalties = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        self.prompt_token_ids = prompt_token_ids if params.repetition_penalty != 1.0 else ()
        self.seen: SeenTokens | None = None

    @property
    def is_banning(self) -> bool:
        """Whether stop tokens cannot be sampled yet."""
        return self.num_generated < self.params.min_tokens and bool(self.stop_token_ids)

    @property
    def is_adjusted(self) -> bool:
        """Whether the logits change before the draw."""
        return self.has_penalties or self.is_banning or bool(self.params.logit_bias)


class SeenTokens:
    """The tokens that a row's penalties fall on. at_most: how many different ones there can be."""

    def __init__(self, prompt_token_ids: Sequence[int], at_most: int) -> None:
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(prompt_token_ids))}
        self._ids = torch.zeros(at_most, dtype=torch.int64)
        self._ids[: len(self._slots)] = torch.tensor(list(self._slots), dtype=torch.int64)
        self._counts = torch.zeros(at_most, dtype=torch.float32)

    @property
    def ids(self) -> Tensor:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Tensor:
        """How often each was generated; 0 where it is only in the prompt."""
        return self._counts[: len(self._slots)]

    def append(self, token_id: int) -> None:
        slot = self._slots.setdefault(token_id, len(self._slots))
        self._ids[slot] = token_id
        self._counts[slot] += 1


@dataclass(frozen=True)
class SamplerOutput:
    """One entry a row. token_ids: NO_TOKEN where the logits are not numbers (the sequence cannot go on); logprobs: None
    where the row did not ask."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True)
class Sampled:
    """Tokens that may still be on their way to the host.

    token_ids:  [num_rows] int64, where the logits are; NO_TOKEN as in SamplerOutput
    read:       waits for them
    """

    token_ids: Tensor
    read: Callable[[], SamplerOutput]


class Sampler:
    """Samples for one model. eos_token_ids: the tokens that end a completion unless it says ignore_eos."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(i for i in eos_token_ids if i < vocab_size)

    def new_row(
        self, params: SamplingParams, prompt_token_ids: Sequence[int], stream_key: int = 0, sample: int = 0
    ) -> SamplerRow:
        """State for one sample. Raises RequestError("bad_params") for token ids that the model does not have."""
        for problem in find_unknown_tokens(vars(params), self.vocab_size):
            raise RequestError("bad_params", str(problem))
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        if params.min_tokens > 0 and len(stops) == self.vocab_size:
            raise RequestError("bad_params", "stop_token_ids: every token is one, so min_tokens leaves none to sample")
        return SamplerRow(params, prompt_token_ids, stops, stream_key, sample)

    def launch(self, logits: Tensor, rows: Sequence[SamplerRow]) -> Sampled:
        """Sample the next token of every row. Here it is done at once; engine/device_sampler.py does not wait.

        logits: [len(rows), vocab_size], any floating dtype, left as they are
        """
        output = self.sample(logits, rows)
        return Sampled(torch.tensor(output.token_ids), lambda: output)

    def forget(self, row: SamplerRow) -> None:
        """Give up what is kept for a row that samples no more."""

    def sample(self, logits: Tensor, rows: Sequence[SamplerRow]) -> SamplerOutput:
        """Sample the next token of every row and append it to the row.

        logits: [len(rows), vocab_size], any floating dtype, left as they are
        """
        token_ids = _best_tokens(logits)
        work = [
            i
            for i, row in enumerate(rows)
            if token_ids[i] != NO_TOKEN and (row.is_adjusted or not row.params.is_greedy)
        ]
        if work:
            chosen = self._choose(_pick(logits, work).float(), [rows[i] for i in work])
            for i, token_id in zip(work, chosen, strict=True):
                token_ids[i] = token_id
        logprobs = self._logprobs(logits, rows, token_ids)
        for row, token_id in zip(rows, token_ids, strict=True):
            if token_id != NO_TOKEN:
                row.num_generated += 1
                if row.has_penalties:
                    self._seen(row).append(token_id)
        return SamplerOutput(token_ids, logprobs)

    def _seen(self, row: SamplerRow) -> SeenTokens:
        if row.seen is None:
            num_tokens = len(set(row.prompt_token_ids)) + row.params.max_tokens
            row.seen = SeenTokens(row.prompt_token_ids, min(self.vocab_size, num_tokens))
        return row.seen

    def _choose(self, logits: Tensor, rows: list[SamplerRow]) -> list[int]:
        """Tokens of rows that need more than an argmax. logits: fp32, overwritten."""
        token_ids = [0] * len(rows)
        if any(row.is_adjusted for row in rows):
            self._adjust(logits, rows)
            token_ids = _best_tokens(logits)
        drawn = [i for i, row in enumerate(rows) if token_ids[i] != NO_TOKEN and not row.params.is_greedy]
        if drawn:
            params, device = [rows[i].params for i in drawn], logits.device
            chosen = sampling.sample(
                logits if len(drawn) == len(rows) else _pick(logits, drawn),
                to_device([max(p.temperature, LEAST_TEMPERATURE) for p in params], torch.float32, device),
                to_device([min(p.top_k, self.vocab_size) for p in params], torch.int64, device),
                to_device([p.top_p for p in params], torch.float64, device),
                to_device([p.min_p for p in params], torch.float64, device),
                [uniform_bits(rows[i].stream_key, rows[i].sample, rows[i].num_generated) for i in drawn],
            )
            for i, token_id in zip(drawn, chosen.tolist(), strict=True):
                token_ids[i] = token_id
        return token_ids

    def _adjust(self, logits: Tensor, rows: Sequence[SamplerRow]) -> None:
        """Apply bias, penalties and bans, in place."""
        add_bias(logits, rows)
        penalized = [i for i, row in enumerate(rows) if row.has_penalties]
        if penalized:
            seen, device = [self._seen(rows[i]) for i in penalized], logits.device
            lengths = torch.tensor([len(tokens.ids) for tokens in seen])
            params = [row.params for row in rows]
            sampling.penalize(
                logits,
                torch.tensor(penalized).repeat_interleave(lengths).to(device),
                torch.cat([tokens.ids for tokens in seen]).to(device),
                torch.cat([tokens.counts for tokens in seen]).to(device),
                to_device([p.repetition_penalty for p in params], torch.float32, device),
                to_device([p.presence_penalty for p in params], torch.float32, device),
                to_device([p.frequency_penalty for p in params], torch.float32, device),
            )
        ban_stop_tokens(logits, rows)

    def _logprobs(self, logits: Tensor, rows: Sequence[SamplerRow], token_ids: list[int]) -> list[TokenLogprobs | None]:
        found: list[TokenLogprobs | None] = [None] * len(rows)
        asked = {i: row.params.logprobs for i, row in enumerate(rows) if token_ids[i] != NO_TOKEN}
        ks = {i: k for i, k in asked.items() if k is not None}
        if ks:
            index = list(ks)
            entries = token_logprobs(_pick(logits, index), [token_ids[i] for i in index], list(ks.values()))
            for i, entry in zip(index, entries, strict=True):
                found[i] = entry
        return found


def token_logprobs(logits: Tensor, token_ids: Sequence[int], ks: Sequence[int]) -> list[TokenLogprobs]:
    """Logprobs of one token a row under softmax(logits), with each row's own number of best ones."""
    logits = logits.float()
    logprobs = logits.log_softmax(1)
    ids = torch.tensor(token_ids, device=logits.device)
    chosen = logprobs.gather(1, ids[:, None]).squeeze(1).tolist()
    _, best_ids = sampling.top_tokens(logits, max(ks))  # of logits: rounding gives different ones the same logprob
    best = logprobs.gather(1, best_ids)
    table = zip(token_ids, chosen, ks, best_ids.tolist(), best.tolist(), strict=True)
    return [TokenLogprobs(t, p, tuple(zip(top_ids[:k], top[:k], strict=True))) for t, p, k, top_ids, top in table]


def add_bias(logits: Tensor, rows: Sequence[SamplerRow]) -> None:
    """Add each row's logit_bias, in place. logits: [len(rows), vocab_size] fp32"""
    biased = [(i, token_id, b) for i, row in enumerate(rows) for token_id, b in row.params.logit_bias.items()]
    if biased:
        at, token_ids, bias = zip(*biased, strict=True)
        index = _index(at, token_ids, logits.device)
        logits[index] += to_device(bias, torch.float32, logits.device)


def ban_stop_tokens(logits: Tensor, rows: Sequence[SamplerRow]) -> None:
    """Rule out, in place, the stop tokens of rows that may not end yet. logits: [len(rows), vocab_size] fp32"""
    banned = [(i, token_id) for i, row in enumerate(rows) if row.is_banning for token_id in row.stop_token_ids]
    if banned:
        at, token_ids = zip(*banned, strict=True)
        logits[_index(at, token_ids, logits.device)] = -torch.inf


def _best_tokens(logits: Tensor) -> list[int]:
    """Token of the largest logit of each row, the lowest id among equals; NO_TOKEN where that is not a number."""
    best = logits.max(1)
    return [t if math.isfinite(v) else NO_TOKEN for v, t in zip(*(part.tolist() for part in best), strict=True)]


def _pick(logits: Tensor, index: list[int]) -> Tensor:
    """A copy of some rows."""
    return logits.clone() if len(index) == len(logits) else logits[torch.tensor(index, device=logits.device)]


def _index(rows: Sequence[int], token_ids: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    return to_device(rows, torch.int64, device), to_device(token_ids, torch.int64, device)
