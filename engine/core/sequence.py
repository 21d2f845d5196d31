"""Sequence: the tokens and cache blocks of one sample of one request."""

from array import array
from dataclasses import dataclass, field

from moray.engine.request import Request, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """Holds the tokens of one sample, and the cache blocks of their keys and values.

    seq_id:               unique, growing in order of arrival; earlier arrivals are scheduled first
    sample:               0 .. n-1; each sample of a request is a sequence
    token_ids:            the prompt, then the generated tokens
    num_prompt_tokens:    tokens of the prompt, a continuation included
    num_computed_tokens:  leading tokens whose keys and values are in the cache
    block_table:          cache blocks in order of position, as 32-bit numbers, which steps copy without a conversion;
                          owned by the BlockManager
    rope_set:             LongRoPE factors of the cached keys: 0 short, 1 long (0 for models without LongRoPE)
    num_cached_tokens:    leading tokens that the latest admission found in the prefix cache
    block_hashes:         hashes of the leading full blocks, for `rope_set`; owned by the BlockManager
    num_registered:       leading blocks that are registered in the prefix cache; owned by the BlockManager
    prompt_logprobs:      logprobs of the prompt tokens, for the Completion; if the request asked for them, the list
                          begins with None for the tokens that need none
    num_forced:           newest tokens that were not sampled, for the grammar forced them; they run together with the
                          token before them, as one decode
    num_tokens:           all its tokens, a pending one included; a plain number, because a step asks for it many times
    max_num_tokens:       how many tokens end it, if nothing else does
    pending_row:          row of the newest token among those that the last step sampled, while it is still on the
                          device; None = all tokens have been read. See await_token()
    """

    seq_id: int
    request: Request
    sample: int = 0
    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    block_table: "array[int]" = field(default_factory=lambda: array("i"))
    rope_set: int = 0
    num_cached_tokens: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    num_forced: int = 0
    num_tokens: int = field(init=False)
    max_num_tokens: int = field(init=False)
    pending_row: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        request = self.request
        self.token_ids = list(request.prompt_token_ids)
        first_scored = 1
        if request.continuations:
            first_scored = len(self.token_ids)
            self.token_ids += request.continuations[self.sample]
        self.num_prompt_tokens = self.num_tokens = len(self.token_ids)
        self.max_num_tokens = self.num_prompt_tokens + request.params.max_tokens
        if request.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * first_scored

    def __len__(self) -> int:
        return self.num_tokens

    def await_token(self, row: int) -> None:
        """Count a token that was sampled and is still on the device as one of the sequence's tokens."""
        self.pending_row = row
        self.num_tokens = len(self.token_ids) + 1

    def forget_pending(self) -> None:
        """Drop the pending token, if there is one: what was sampled is no token."""
        self.pending_row = None
        self.num_tokens = len(self.token_ids)

    def append(self, token_id: int, *, is_forced: bool = False) -> None:
        """Append a generated token: the pending one, if there is one. is_forced: it was not sampled"""
        self.token_ids.append(token_id)
        if self.pending_row is None:
            self.num_tokens += 1
        else:
            self.pending_row = None
        self.num_forced = self.num_forced + 1 if is_forced else 0

    @property
    def num_uncomputed_tokens(self) -> int:
        """Return the number of tokens, a pending one included, whose keys and values are not in the cache."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def first_needed_logit(self) -> int:
        """Return the index of the first token whose logits are still needed; cached tokens before it are not run."""
        num_known = len(self.prompt_logprobs)
        return (num_known if 0 < num_known < self.num_prompt_tokens else self.num_tokens) - 1

    @property
    def num_generated(self) -> int:
        """Return the number of generated tokens, a pending one included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_complete(self) -> bool:
        """Return whether the last token is sampled and only has to be read."""
        return self.pending_row is not None and self.num_tokens >= self.max_num_tokens

    @property
    def generated_token_ids(self) -> list[int]:
        """Return the generated tokens that have been read."""
        return self.token_ids[self.num_prompt_tokens :]
