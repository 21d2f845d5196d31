"""Turns SIGINT, SIGTERM and SIGHUP into events for the driver instead of exceptions.

Ray Data would end at the first exception and commit nothing.
"""

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalReceiver:
    """Handles signals that reach this process directly and those that the parent process passes on.

    Ctrl-C in a terminal comes both ways and counts once.

    act:  called in the main thread with each signal's number
    """

    def __init__(self, act: Callable[[int], None]) -> None:
        self.act = act
        self._direct: Counter[int] = Counter()
        self._forwarded: Counter[int] = Counter()

    def on_direct(self, number: int, _frame: FrameType | None = None) -> None:
        """Handle a signal that the system delivered to this process."""
        self._direct[number] += 1
        if self._direct[number] > self._forwarded[number]:
            self.act(number)

    def on_forwarded(self, number: int) -> None:
        """Handle a signal that the parent process received."""
        self._forwarded[number] += 1
        if self._forwarded[number] > self._direct[number]:
            self.act(number)


def _exit(number: int) -> None:
    raise SystemExit(128 + number)


RECEIVER = SignalReceiver(_exit)  # the receiver of this process


def exit_on_signals() -> None:
    """Make signals end the process by SystemExit, until catch_signals is used."""
    RECEIVER.act = _exit
    for number in _handled_signals():
        signal.signal(number, RECEIVER.on_direct)


@contextmanager
def catch_signals(on_signal: Callable[[str], None]) -> Iterator[None]:
    """Call `on_signal` with the name of each signal that arrives.

    Outside the main thread, where Python allows no handlers, this does nothing.
    """
    if current_thread() is not main_thread():
        yield
        return
    act_before, RECEIVER.act = RECEIVER.act, lambda number: on_signal(signal.Signals(number).name)
    before = {number: signal.signal(number, RECEIVER.on_direct) for number in _handled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        RECEIVER.act = act_before


def _handled_signals() -> list[signal.Signals]:
    """Return the signals to handle; SIGHUP is left out where it is ignored, as nohup sets it."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if number is not signal.SIGHUP or not is_ignored]
