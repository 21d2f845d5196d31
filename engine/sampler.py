"""Sampler: one token for every sequence of a step. Engine calls it with the step's logits.

In this order: logits, logit_bias, penalties, ban of stop tokens before min_tokens, temperature, top_k, top_p, min_p,
draw. A row's token and logprobs do not depend on the rows beside it, bit by bit. Logprobs are the model's: of the
logits before all this.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import RequestError
from engine.params import SamplingParams
from engine.request import TokenLogprobs
from kernels.cpu import sampling
from kernels.cpu.philox import uniform_bits

NO_TOKEN = -1
LEAST_TEMPERATURE = 1e-6  # far below what still lets anything but the best token be drawn


class SamplerRow:
    """One sample's state in the sampler: what it asks for and the tokens it has seen. Made by Sampler.new_row.

    stop_token_ids: tokens that end this sample: params.stop_token_ids and, unless ignore_eos, the model's
    num_generated:  tokens sampled so far, the position in the random stream
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        stop_token_ids: frozenset[int],
        stream_key: int,
        sample: int,
        vocab_size: int,
    ) -> None:
        self.params = params
        self.stop_token_ids = stop_token_ids
        self.stream_key = stream_key
        self.sample = sample
        self.num_generated = 0
        self.has_penalties = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        self._slots: dict[int, int] = {}
        if self.has_penalties:
            prompt = dict.fromkeys(prompt_token_ids) if params.repetition_penalty != 1.0 else {}
            self._slots = {token_id: slot for slot, token_id in enumerate(prompt)}
            size = min(vocab_size, len(prompt) + params.max_tokens)
            self._seen = torch.zeros(size, dtype=torch.int64)
            self._seen[: len(prompt)] = torch.tensor(list(prompt), dtype=torch.int64)
            self._counts = torch.zeros(size, dtype=torch.float32)

    @property
    def is_banning(self) -> bool:
        """Whether stop tokens cannot be sampled yet."""
        return self.num_generated < self.params.min_tokens and bool(self.stop_token_ids)

    @property
    def is_adjusted(self) -> bool:
        """Whether the logits change before the draw."""
        return self.has_penalties or self.is_banning or bool(self.params.logit_bias)

    @property
    def seen(self) -> tuple[Tensor, Tensor]:
        """Ids of the tokens that penalties fall on, and how often each was generated."""
        return self._seen[: len(self._slots)], self._counts[: len(self._slots)]

    def append(self, token_id: int) -> None:
        self.num_generated += 1
        if self.has_penalties:
            slot = self._slots.setdefault(token_id, len(self._slots))
            self._seen[slot] = token_id
            self._counts[slot] += 1


@dataclass(frozen=True)
class SamplerOutput:
    """One entry a row. token_ids: NO_TOKEN where the logits are not numbers (the sequence cannot go on); logprobs: None
    where the row did not ask."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class Sampler:
    """Samples for one model. eos_token_ids: the tokens that end a completion unless it says ignore_eos."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(i for i in eos_token_ids if i < vocab_size)

    def new_row(
        self, params: SamplingParams, prompt_token_ids: Sequence[int], stream_key: int = 0, sample: int = 0
    ) -> SamplerRow:
        """State for one sample. Raises RequestError("bad_params") for token ids that the model does not have."""
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if outside := [i for i in ids if i >= self.vocab_size]:
                last = self.vocab_size - 1
                raise RequestError("bad_params", f"{name}: the model's token ids end at {last}; has {outside[:5]}")
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        if params.min_tokens > 0 and len(stops) == self.vocab_size:
            raise RequestError("bad_params", "stop_token_ids: every token is one, so min_tokens leaves none to sample")
        return SamplerRow(params, prompt_token_ids, stops, stream_key, sample, self.vocab_size)

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
                row.append(token_id)
        return SamplerOutput(token_ids, logprobs)

    def _choose(self, logits: Tensor, rows: list[SamplerRow]) -> list[int]:
        """Tokens of rows that need more than an argmax. logits: fp32, overwritten."""
        token_ids = [0] * len(rows)
        if any(row.is_adjusted for row in rows):
            _adjust(logits, rows)
            token_ids = _best_tokens(logits)
        drawn = [i for i, row in enumerate(rows) if token_ids[i] != NO_TOKEN and not row.params.is_greedy]
        if drawn:
            params, device = [rows[i].params for i in drawn], logits.device
            chosen = sampling.sample(
                logits if len(drawn) == len(rows) else _pick(logits, drawn),
                _column([max(p.temperature, LEAST_TEMPERATURE) for p in params], torch.float32, device),
                _column([min(p.top_k, self.vocab_size) for p in params], torch.int64, device),
                _column([p.top_p for p in params], torch.float64, device),
                _column([p.min_p for p in params], torch.float64, device),
                [uniform_bits(rows[i].stream_key, rows[i].sample, rows[i].num_generated) for i in drawn],
            )
            for i, token_id in zip(drawn, chosen.tolist(), strict=True):
                token_ids[i] = token_id
        return token_ids

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


def _adjust(logits: Tensor, rows: list[SamplerRow]) -> None:
    """Apply bias, penalties and bans, in place."""
    device = logits.device
    biased = [(i, token_id, b) for i, row in enumerate(rows) for token_id, b in row.params.logit_bias.items()]
    if biased:
        at, token_ids, bias = zip(*biased, strict=True)
        index = torch.tensor(at, device=device), torch.tensor(token_ids, device=device)
        logits[index] += torch.tensor(bias, dtype=torch.float32, device=device)

    penalized = [i for i, row in enumerate(rows) if row.has_penalties]
    if penalized:
        seen, counts = zip(*(rows[i].seen for i in penalized), strict=True)
        lengths = torch.tensor([len(ids) for ids in seen])
        params = [row.params for row in rows]
        sampling.penalize(
            logits,
            torch.tensor(penalized).repeat_interleave(lengths).to(device),
            torch.cat(seen).to(device),
            torch.cat(counts).to(device),
            _column([p.repetition_penalty for p in params], torch.float32, device),
            _column([p.presence_penalty for p in params], torch.float32, device),
            _column([p.frequency_penalty for p in params], torch.float32, device),
        )

    banned = [(i, token_id) for i, row in enumerate(rows) if row.is_banning for token_id in row.stop_token_ids]
    if banned:
        at, token_ids = zip(*banned, strict=True)
        logits[torch.tensor(at, device=device), torch.tensor(token_ids, device=device)] = -torch.inf


def _best_tokens(logits: Tensor) -> list[int]:
    """Token of the largest logit of each row, the lowest id among equals; NO_TOKEN where that is not a number."""
    best = logits.max(1)
    return [t if math.isfinite(v) else NO_TOKEN for v, t in zip(*(part.tolist() for part in best), strict=True)]


def _pick(logits: Tensor, index: list[int]) -> Tensor:
    """A copy of some rows."""
    return logits.clone() if len(index) == len(logits) else logits[torch.tensor(index, device=logits.device)]


def _column(values: list[float] | list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
