import os
import signal
import threading
from collections.abc import Iterator

import pytest

from moray.batch.runtime.signals import SignalReceiver, catch_signals


@pytest.fixture(autouse=True)
def _python_default() -> Iterator[None]:
    """A background process of a shell starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_are_reported_and_do_nothing_else() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    received: list[str] = []
    with catch_signals(received.append):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert received == ["SIGINT", "SIGTERM"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_in_another_thread_nothing_is_touched() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def use() -> None:
        with catch_signals(lambda name: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_that_comes_directly_and_from_the_parent_counts_once() -> None:
    received: list[int] = []
    receiver = SignalReceiver(received.append)
    receiver.on_direct(signal.SIGINT)  # Ctrl-C: both ways, in either order
    receiver.on_forwarded(signal.SIGINT)
    assert received == [signal.SIGINT]
    receiver.on_forwarded(signal.SIGINT)
    receiver.on_direct(signal.SIGINT)
    assert received == [signal.SIGINT] * 2
    receiver.on_forwarded(signal.SIGINT)  # sent to the parent alone
    receiver.on_direct(signal.SIGTERM)  # sent to the driver alone
    assert received == [signal.SIGINT] * 3 + [signal.SIGTERM]


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    received: list[str] = []
    try:
        with catch_signals(received.append):
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with catch_signals(received.append):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert received == ["SIGHUP"]
