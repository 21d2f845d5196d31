"""SIGINT and SIGTERM as news for the driver, not as exceptions: Ray Data would end at the first one and commit
nothing."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def catch_signals(tell: Callable[[str], None]) -> Iterator[None]:
    """Call `tell` with the name of each signal that comes. Outside the main thread, where Python allows no handlers,
    signals are the caller's matter."""
    if current_thread() is not main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda number, _: tell(signal.Signals(number).name)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
