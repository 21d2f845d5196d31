"""SIGINT and SIGTERM as news for the driver, not as exceptions: Ray Data would end at the first one and commit
nothing."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def catch_signals(tell: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Call `tell` with the name of each signal that comes. Yields what puts the handlers back in place: ray.init
    installs its own. Outside the main thread, where Python allows no handlers, signals are the caller's matter."""

    def install() -> None:
        if current_thread() is main_thread():
            for number in _SIGNALS:
                signal.signal(number, lambda number, _: tell(signal.Signals(number).name))

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    install()
    try:
        yield install
    finally:
        if current_thread() is main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
