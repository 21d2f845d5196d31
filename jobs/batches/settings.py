"""Settings: what a coordinator of batches needs of the endpoint's arguments."""

from dataclasses import dataclass

from moray.jobs.batches.store import BatchStore
from moray.serve.args import EndpointArgs

LOCAL_POLL_S, REMOTE_POLL_S = 0.5, 5.0  # between two looks for new batches and for cancelled ones
RETRY_S = 10.0  # before a batch that failed is tried again, at first
DRAIN_S = 600.0  # that requests in flight have when the batch expires or is cancelled
DAY_S = 24 * 3600


@dataclass(frozen=True)
class Settings:
    """Holds what a coordinator needs of the endpoint's arguments.

    Seconds of poll_s and below are shortened by tests.
    """

    model: str
    model_path: str
    max_requests: int
    max_line_bytes: int
    file_retention_s: float
    batch_retention_s: float
    poll_s: float
    retry_s: float = RETRY_S
    drain_s: float = DRAIN_S

    @classmethod
    def of(cls, args: EndpointArgs, store: BatchStore) -> "Settings":
        """Return the settings of an endpoint."""
        return cls(
            args.model_name,
            args.model,
            args.max_batch_requests,
            args.max_body_bytes,
            args.file_retention_days * DAY_S,
            args.batch_retention_days * DAY_S,
            LOCAL_POLL_S if store.folder.is_local else REMOTE_POLL_S,
        )
