"""Cases of sampling and penalties with Phi-3.5-MoE's vocabulary; peers are torch's argmax and a top_p by sorting."""

from functools import partial

import torch
from torch import Tensor

from gpu.cases import Case, Op, normal
from gpu.roofline import Work
from moray.kernels.gpu.penalties import count_tokens, penalize
from moray.kernels.gpu.sampling import sample
from moray.kernels.gpu.token_logprobs import token_logprobs

DTYPE = torch.bfloat16


class Sampling:
    """Makes the cases."""

    def __init__(self, device: torch.device, *, is_dry: bool) -> None:
        self.device = device
        self.vocab = 64 if is_dry else 32064

    def ops(self) -> list[Op]:
        filters = {
            "greedy": (0.0, 0, 1.0),
            "temperature": (1.0, 0, 1.0),
            "top_p": (1.0, 0, 0.9),
            "top_k": (1.0, 50, 1.0),
        }
        ops = [Op(f"sample {name}", partial(self.sample, name, *values), 512) for name, values in filters.items()]
        return [*ops, Op("logprobs", self.logprobs, 512), Op("penalize and record", self.penalize, 512)]

    def sample(self, name: str, temperature: float, top_k: int, top_p: float, rows: int) -> Case:
        logits = normal(rows, self.vocab, dtype=DTYPE, device=self.device, std=3.0)
        column = partial(torch.full, (rows,), device=self.device)
        call = partial(
            sample,
            logits,
            column(fill_value=temperature, dtype=torch.float32),
            column(fill_value=top_k, dtype=torch.int32),
            column(fill_value=top_p, dtype=torch.float64),
            column(fill_value=0.0, dtype=torch.float64),
            torch.arange(rows, device=self.device),
            column(fill_value=0, dtype=torch.int32),
            column(fill_value=7, dtype=torch.int64),
        )
        peers = {}
        if name == "greedy":
            peers["torch.argmax"] = [partial(torch.argmax, logits, 1)] * 2
        if name == "top_p":
            peers["torch, by sorting"] = [partial(_top_p_by_sorting, logits, top_p)] * 2
        return Case(f"sample {name}", rows, Work(logits.nbytes), [call] * 2, peers)

    def logprobs(self, rows: int) -> Case:
        """Score a token a row, with the best token beside it, as jobs with task score do."""
        logits = normal(rows, self.vocab, dtype=DTYPE, device=self.device, std=3.0)
        token_ids = torch.randint(self.vocab, (rows,), device=self.device)

        def of_torch() -> object:
            logprobs = logits.float().log_softmax(1)
            return logprobs.gather(1, token_ids[:, None]), logprobs.topk(1)

        peers = {"torch, log_softmax and topk": [of_torch] * 2}
        call = partial(token_logprobs, logits, token_ids, 1)
        return Case("logprobs", rows, Work(logits.nbytes), [call] * 2, peers)

    def penalize(self, rows: int) -> Case:
        logits = torch.randn(rows, self.vocab, device=self.device)
        seen = torch.randint(-20, 3, (rows, self.vocab), device=self.device, dtype=torch.int32).clamp_(min=0)
        slots = torch.arange(rows, device=self.device, dtype=torch.int32)
        amounts = [torch.full((rows,), value, device=self.device) for value in (1.1, 0.2, 0.1)]
        token_ids = torch.randint(self.vocab, (rows,), device=self.device)

        def call() -> None:
            penalize(logits, seen, slots, *amounts)
            count_tokens(seen, slots, token_ids)

        num_bytes = seen.nbytes + 8 * int((seen > 0).sum())
        return Case("penalize and record", rows, Work(num_bytes), [call] * 2)


def _top_p_by_sorting(logits: Tensor, top_p: float) -> Tensor:
    """Sample in the usual way: sort, cut the tail, draw by the exponential trick (multinomial waits for the host)."""
    values, ids = logits.float().sort(dim=1, descending=True)
    shares = values.softmax(1)
    shares = shares.masked_fill(shares.cumsum(1) - shares > top_p, 0.0)
    drawn = (shares / torch.empty_like(shares).exponential_()).argmax(1, keepdim=True)
    return ids.gather(1, drawn)
