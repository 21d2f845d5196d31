"""Choose the backend: the register of devices, and which of them runs the model."""

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

from moray.engine.backends.base import Backend
from moray.engine.backends.cpu.backend import open_cpu
from moray.engine.backends.cuda.device import has_cuda, open_cuda
from moray.engine.errors import UserError

logger = logging.getLogger(__name__)

OVERRIDE = "MORAY_DEVICE"  # an environment variable, which overrides EngineConfig.device


class _Device(NamedTuple):
    """Describes a device in the register.

    is_there:  returns whether this machine has such a device
    open:      checks the device and returns its backend; it alone may import the kernels
    """

    is_there: Callable[[], bool]
    open: Callable[[], Backend]


# The first device that is there is "auto".
DEVICES = {"cuda": _Device(has_cuda, open_cuda), "cpu": _Device(lambda: True, open_cpu)}


def choose_backend(name: str) -> Backend:
    """Return the backend of the device that `name`, an EngineConfig.device, or MORAY_DEVICE asks for.

    MORAY_DEVICE, an environment variable, overrides `name`. Raises UserError for an unknown name, and DeviceError if
    this machine has no such device or cannot run the kernels on it.
    """
    if (override := os.environ.get(OVERRIDE)) and override != name:
        logger.warning("%s is %s, which overrides the device %s", OVERRIDE, override, name)
        name = override
    if name == "auto":
        name = next(name for name, device in DEVICES.items() if device.is_there())
    if name not in DEVICES:
        *others, last = sorted(DEVICES)
        raise UserError(f"the device is {name!r}; it can be {', '.join(['auto', *others])} or {last}")
    return DEVICES[name].open()
