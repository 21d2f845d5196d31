"""Gathering: the rule by which prompts wait for each other, so that fewer steps contain prompts. Pure."""

from dataclasses import dataclass

from moray.engine.core.sequence import Sequence


@dataclass(frozen=True)
class Gathering:
    """Says which waiting sequences may leave their seats empty for some steps, until their prompts fill a step.

    Without it a full engine admits a sequence whenever one ends, and with many short completions most steps have a
    prompt beside the decodes. What is empty meanwhile is bounded by `seats`: with one more free seat all are admitted.
    So is the time, because each seat that becomes free counts, whether or not there is a sequence for it. The rule
    follows from the queue alone, without a clock.

    seats:    most seats that may be empty; 0 = every sequence is admitted at once
    is_bulk:  nobody waits for any first token, as in a batch job: sequences of the highest priority, which is 0, may
              wait too
    """

    seats: int = 0
    is_bulk: bool = False

    def may_wait(self, seq: Sequence, num_free: int) -> bool:
        """Return whether a sequence may wait for others. num_free: seats that would be empty meanwhile"""
        return num_free <= self.seats and (self.is_bulk or seq.request.priority > 0)


AT_ONCE = Gathering()


def choose_gathering(max_num_seqs: int, share: float, *, is_bulk: bool) -> Gathering:
    """Return the rule for an engine of so many seats. share: of the seats, that may be empty, rounded down"""
    return Gathering(int(share * max_num_seqs), is_bulk)
