"""sweep() removes what is older than its time from a store: files, batches, and what was never finished."""

from moray.jobs.batches.ids import made_at_s
from moray.jobs.batches.store import BatchStore

UNFINISHED_S = 24 * 3600.0  # after which a content that did not become a file has no writer any more


def sweep(store: BatchStore, now_s: float, batch_retention_s: float) -> None:
    """Remove files that have expired, and records and job folders of batches that ended long ago.

    now_s:             seconds since 1970
    batch_retention_s: seconds for which a batch is kept after its end
    """
    for place, file_id in list(store.all_records("files")):
        file = store.read_at(place, file_id)
        if file is not None and file.expires_at <= now_s:
            store.remove_file_at(place, file_id)
    for place, batch_id in list(store.all_records("batches")):
        batch = store.read_batch_at(place, batch_id)
        if batch is not None and batch.ended_at is not None and batch.ended_at + batch_retention_s <= now_s:
            store.remove_batch(place, batch_id)
    kept = set(store.all_records("files"))
    for place, file_id in list(store.contents()):
        if (place, file_id) not in kept and made_at_s(file_id) + UNFINISHED_S <= now_s:
            store.remove_file_at(place, file_id)
    for place, batch_id in list(store.marks()):
        if store.read_batch_at(place, batch_id) is None and made_at_s(batch_id) + UNFINISHED_S <= now_s:
            store.remove_batch(place, batch_id)
