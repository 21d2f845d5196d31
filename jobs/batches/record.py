"""BatchRecord: what is known of a batch, and its states. Pure: a change makes a new record, the caller gives the time.

validating -> failed | in_progress -> finalizing -> completed
in_progress -> expired
validating | in_progress -> cancelling -> cancelled
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any


class BatchStatus(StrEnum):
    """The state of a batch, in OpenAI's words."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED)


NEXT: Mapping[BatchStatus, frozenset[BatchStatus]] = {
    BatchStatus.VALIDATING: frozenset({BatchStatus.FAILED, BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING}),
    BatchStatus.IN_PROGRESS: frozenset({BatchStatus.FINALIZING, BatchStatus.EXPIRED, BatchStatus.CANCELLING}),
    BatchStatus.FINALIZING: frozenset({BatchStatus.COMPLETED}),
    BatchStatus.CANCELLING: frozenset({BatchStatus.CANCELLED}),
}
ENDS = {
    BatchStatus.FINALIZING: BatchStatus.COMPLETED,
    BatchStatus.IN_PROGRESS: BatchStatus.EXPIRED,
    BatchStatus.CANCELLING: BatchStatus.CANCELLED,
}


class WrongStateError(ValueError):
    """Means that a batch is not in a state in which the change is possible."""


@dataclass(frozen=True)
class LineError:
    """Describes what is wrong with a line of the input file, which counts from 1; None = with the file as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass(frozen=True)
class BatchRecord:
    """Holds all that is known of a batch; times are seconds since 1970.

    window_s:          seconds from its creation in which it has to be done
    output_expires_s:  seconds for which its output files are kept; None = as all files
    total, completed, failed:     requests; total is 0 until the file is validated. In a final state they add up
    input_tokens, output_tokens:  tokens of the completed requests
    errors:            why the input file was rejected
    """

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    window_s: int
    created_at: int
    model: str | None = None
    metadata: Mapping[str, str] | None = None
    output_expires_s: int | None = None
    status: BatchStatus = BatchStatus.VALIDATING
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    errors: Sequence[LineError] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def expires_at(self) -> int:
        return self.created_at + self.window_s

    @property
    def ended_at(self) -> int | None:
        """Return when it reached its final state; None before."""
        return self.completed_at or self.failed_at or self.expired_at or self.cancelled_at

    @property
    def stopped_at(self) -> int:
        """Return when its last request was started, by the record: its output files are named after this moment."""
        return self.finalizing_at or self.cancelling_at or self.expires_at

    def reject(self, errors: Sequence[LineError], now: int) -> "BatchRecord":
        """Return the batch after its input file was found to be wrong; nothing of it runs."""
        if not errors:
            raise ValueError("a batch is rejected for a reason")
        return self._move(BatchStatus.FAILED, failed_at=now, errors=tuple(errors))

    def start(self, total: int, model: str, now: int) -> "BatchRecord":
        """Return the batch after its input file was found to be right."""
        return self._move(BatchStatus.IN_PROGRESS, in_progress_at=now, total=total, model=model)

    def count(self, completed: int, failed: int, input_tokens: int, output_tokens: int) -> "BatchRecord":
        """Return the batch with the counts of its committed requests; counts never go back."""
        if self.status.is_final or completed + failed > self.total:
            raise WrongStateError(f"{self.id} is {self.status} with {self.total} requests")
        return replace(
            self,
            completed=max(completed, self.completed),
            failed=max(failed, self.failed),
            input_tokens=max(input_tokens, self.input_tokens),
            output_tokens=max(output_tokens, self.output_tokens),
        )

    def finalize(self, now: int) -> "BatchRecord":
        """Return the batch when all of its requests are committed, and its output files are to be written."""
        return self._move(BatchStatus.FINALIZING, finalizing_at=now)

    def cancel(self, now: int) -> "BatchRecord":
        """Return the batch after its owner asked for its end; the same batch where that was done before."""
        if self.status is BatchStatus.CANCELLING:
            return self
        return self._move(BatchStatus.CANCELLING, cancelling_at=now)

    def end(self, now: int, output_file_id: str | None, error_file_id: str | None) -> "BatchRecord":
        """Return the batch in the final state that follows its present one: completed, expired or cancelled.

        Requests that were never run count as failed.
        """
        status = ENDS.get(self.status)
        if status is None:
            raise WrongStateError(f"{self.id} is {self.status}: it cannot end")
        times = {f"{status}_at": now}
        ended = self._move(status, output_file_id=output_file_id, error_file_id=error_file_id, **times)
        return replace(ended, failed=self.total - self.completed)

    def _move(self, status: BatchStatus, **changes: Any) -> "BatchRecord":
        if status not in NEXT.get(self.status, frozenset()):
            raise WrongStateError(f"{self.id} is {self.status}: it cannot become {status}")
        return replace(self, status=status, **changes)

    def to_object(self) -> dict[str, Any]:
        """Return the JSON object that the API sends."""
        errors = {"object": "list", "data": [asdict(error) for error in self.errors]} if self.errors else None
        total_tokens = self.input_tokens + self.output_tokens
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": str(self.status),
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "in_progress_at": self.in_progress_at,
            "expires_at": self.expires_at,
            "finalizing_at": self.finalizing_at,
            "completed_at": self.completed_at,
            "failed_at": self.failed_at,
            "expired_at": self.expired_at,
            "cancelling_at": self.cancelling_at,
            "cancelled_at": self.cancelled_at,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": {
                "input_tokens": self.input_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": self.output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": total_tokens,
            },
            "metadata": None if self.metadata is None else dict(self.metadata),
        }

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_object(cls, values: Mapping[str, Any]) -> "BatchRecord":
        """Return the batch of the JSON object that to_json wrote.

        Fields of other versions of moray are left out or get their defaults.
        """
        known = {item.name: values[item.name] for item in fields(cls) if item.name in values}
        known |= {"status": BatchStatus(known["status"]), "errors": tuple(LineError(**one) for one in known["errors"])}
        return cls(**known)
