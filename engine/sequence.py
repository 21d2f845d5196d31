"""Sequence: one sample of one request on its way through the scheduler."""

from dataclasses import dataclass, field

from engine.request import Request, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """The tokens of one sample and where their keys and values lie.

    seq_id:               unique, growing in order of arrival; earlier arrivals go first
    sample:               0 .. n-1; the samples of a request are sequences of their own
    token_ids:            prompt, then what was generated
    num_computed_tokens:  leading tokens whose keys and values are in the cache
    block_table:          cache blocks in order of position; owned by the BlockManager
    rope_set:             LongRoPE factors of the cached keys: 0 short, 1 long (0 for models without LongRoPE)
    num_cached_tokens:    leading tokens that the latest admission found in the prefix cache
    block_hashes:         hashes of leading full blocks, for `rope_set`; owned by the BlockManager
    num_registered:       leading blocks the prefix cache has been told of; owned by the BlockManager
    logprobs, prompt_logprobs:  what the Engine gathers for the Completion; the latter, where it is asked for, begins
                                with None for the tokens that need none
    unread:               the newest token is sampled but still on the device: its row among those the last step
                          sampled; it counts as one of the sequence's tokens
    """

    seq_id: int
    request: Request
    sample: int = 0
    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    rope_set: int = 0
    num_cached_tokens: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    unread: int | None = None

    def __post_init__(self) -> None:
        request = self.request
        self.token_ids = list(request.prompt_token_ids)
        first_scored = 1
        if request.continuations:
            first_scored = len(self.token_ids)
            self.token_ids += request.continuations[self.sample]
        self.num_prompt_tokens = len(self.token_ids)
        if request.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * first_scored

    def __len__(self) -> int:
        return len(self.token_ids) + (self.unread is not None)

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self) - self.num_computed_tokens

    @property
    def next_logits(self) -> int:
        """Index of the first token after which logits are still wanted; those before it need not be run if cached."""
        known = len(self.prompt_logprobs)
        return (known if 0 < known < self.num_prompt_tokens else len(self)) - 1

    @property
    def num_generated(self) -> int:
        return len(self) - self.num_prompt_tokens

    @property
    def is_complete(self) -> bool:
        """Its last token is sampled and only has to be read."""
        return self.unread is not None and self.num_generated >= self.request.params.max_tokens

    @property
    def generated_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]
