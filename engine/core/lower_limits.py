"""Lower the limits of a step after one ran out of memory. Pure."""

from dataclasses import replace

from moray.engine.core.limits import Limits


def lower_limits(limits: Limits, num_tokens: int, num_sampled: int | None = None) -> Limits | None:
    """Return the limits with which half of the step would have run; None where it cannot be halved.

    Each sequence of a step needs one of its tokens, so there are no more sequences than tokens.

    num_tokens:   tokens of the step
    num_sampled:  sequences of which the step sampled a token, if that ran out of memory; None = the model did
    """
    if num_sampled is not None:
        seqs = min(limits.max_num_seqs, num_sampled // 2)
        return replace(limits, max_num_seqs=seqs) if seqs else None
    tokens = min(limits.max_num_batched_tokens, num_tokens // 2)
    if not tokens:
        return None
    return replace(
        limits,
        max_num_seqs=min(limits.max_num_seqs, tokens),
        max_num_batched_tokens=tokens,
        max_num_bulk_tokens=min(limits.max_num_bulk_tokens, tokens),
    )


def describe_change(old: Limits, new: Limits) -> str:
    """Return each lowered limit by the key of the job spec, with its old and its new value."""
    pairs = {"max_num_seqs": "sequences", "max_num_batched_tokens": "tokens"}
    return " and ".join(
        f"engine.{name} from {getattr(old, name):,} to {getattr(new, name):,} {unit} a step"
        for name, unit in pairs.items()
        if getattr(new, name) < getattr(old, name)
    )
