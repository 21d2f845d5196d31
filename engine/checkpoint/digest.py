"""A digest of a checkpoint for a job's fingerprint: cheap beside reading it all, and different when it was changed."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

from engine.remote import ModelFolder

SAMPLES = 64
SAMPLE_BYTES = 64 << 10
THREADS = 16  # samples of a remote file are round trips


def weights_digest(folder: ModelFolder) -> str:
    """SHA-256 (hex) over the hub's revision, or else over the folder's files.

    Of a weight file: size, header, and SAMPLES evenly spread samples. Of config and tokenizer files: everything.
    Does not depend on where the folder lies. Raises CheckpointError where it cannot be read.
    """
    if folder.revision is not None:
        return hashlib.sha256(f"revision {folder.revision}".encode()).hexdigest()
    sizes, weights = folder.files(), folder.weight_files()
    spans = [(name, 0, sizes[name]) for name in folder.side_files()]
    spans += [(name, offset, length) for name in weights for offset, length in _samples(folder, name, sizes[name])]
    digest = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as threads:
        for span, data in zip(spans, threads.map(lambda span: folder.read(*span), spans), strict=True):
            digest.update(f"{span} of {sizes[span[0]]}\\n".encode())
            digest.update(data)
    return digest.hexdigest()


def _samples(folder: ModelFolder, name: str, size: int) -> list[tuple[int, int]]:
    """(offset, length) of the header and of the samples."""
    header = 8 + int.from_bytes(folder.read(name, 0, 8), "little")
    last = max(0, size - SAMPLE_BYTES)
    offsets = sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})
    return [(0, min(header, size))] + [(offset, SAMPLE_BYTES) for offset in offsets]
