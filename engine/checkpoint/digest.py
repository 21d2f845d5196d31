"""Compute a digest of a checkpoint for a job's fingerprint, which changes when the checkpoint does.

It reads a small part of the weights, so it is cheap compared with reading them all.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.checkpoint.weight_files import measure_header

SAMPLES = 64  # samples per weight file
SAMPLE_BYTES = 64 << 10  # bytes per sample
THREADS = 16  # each sample of a remote file is a round trip


def weights_digest(folder: ModelSource) -> str:
    """Return the SHA-256 (hex) of the hub's revision, or else of the folder's files.

    Of a weight file it covers the size, the header and SAMPLES evenly spread samples; of config and tokenizer files it
    covers everything. It does not depend on the folder's location. Raises CheckpointError if the folder cannot be read.
    """
    if folder.revision is not None:
        return hashlib.sha256(f"revision {folder.revision}".encode()).hexdigest()
    sizes, weights = folder.files(), folder.weight_files()
    spans = [(name, 0, sizes[name]) for name in folder.metadata_files()]
    spans += [(name, offset, length) for name in weights for offset, length in _samples(folder, name, sizes[name])]
    digest = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as threads:
        for span, data in zip(spans, threads.map(lambda span: folder.read(*span), spans), strict=True):
            digest.update(f"{span} of {sizes[span[0]]}\\n".encode())
            digest.update(data)
    return digest.hexdigest()


def _samples(folder: ModelSource, name: str, size: int) -> list[tuple[int, int]]:
    """Return (offset, length) of the header and of the samples."""
    header = measure_header(partial(folder.read, name), size, f"{folder.path}/{name}")
    last = max(0, size - SAMPLE_BYTES)
    offsets = sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})
    return [(0, header)] + [(offset, SAMPLE_BYTES) for offset in offsets]
