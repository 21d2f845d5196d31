"""Choose the StoredFormat of a scheme."""

from moray.engine.quantization.on_load import OnLoad
from moray.engine.quantization.published.unpack import Published
from moray.engine.quantization.scheme import Scheme
from moray.engine.quantization.stored import StoredFormat


def stored_format(scheme: Scheme) -> StoredFormat:
    """Return what finds and reads the quantized weights of a checkpoint with this scheme."""
    return OnLoad(scheme) if scheme.method == "on_load" else Published(scheme)
