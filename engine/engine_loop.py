"""EngineLoop: builds an Engine in a thread of its own and steps it there. AsyncEngine and the batch worker use it."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from moray.engine.errors import RequestError
from moray.engine.request import Output, Request

if TYPE_CHECKING:  # hosts that must not load torch import this module too
    from moray.engine.engine import Engine


class EngineLoop:
    """Steps an engine as long as it has work, and runs commands from other threads between its steps.

    The callbacks are called in the engine's thread:

    after_step:    with the outputs of each step, which may be none
    before_step:   before each step, and before the loop waits for a command; it may add requests to the engine
    on_rejection:  with a submitted request that the engine refused, and the reason
    on_failure:    with what the engine or a callback raised; the loop has ended then
    clock:         seconds, monotonic

    The engine is built in the thread that steps it: where two threads have run torch, OpenMP counts the worker threads
    of both, finds more threads than cores and stops spinning, which costs a sixth of the speed.
    """

    engine: "Engine"  # set once the future of start() is done

    def __init__(
        self,
        make_engine: "Callable[[], Engine]",
        *,
        after_step: Callable[[Sequence[Output]], None],
        on_failure: Callable[[BaseException], None],
        before_step: Callable[[], None] = lambda: None,
        on_rejection: Callable[[Request, RequestError], None] = lambda request, error: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._before_step = before_step
        self._after_step = after_step
        self._on_rejection = on_rejection
        self._on_failure = on_failure
        self._clock = clock
        self._busy_since_s: float | None = None  # when the engine came back from its last step; None while it is idle
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._ready: Future[None] = Future()
        self._thread = Thread(target=self._run, args=(make_engine,), name="engine", daemon=True)

    def start(self) -> Future[None]:
        """Start the thread; the future is done when the engine is built, and raises what make_engine raised."""
        self._ready.set_running_or_notify_cancel()  # so that nobody who waits for it can cancel it
        self._thread.start()
        return self._ready

    def submit(self, requests: Sequence[Request]) -> None:
        """Add requests before the next step, up to the first one that the engine refuses.

        A running step of requests with a lower priority is interrupted for them.
        """
        self.run_between_steps(partial(self._add, requests))
        self.engine.interrupt_step(min(request.priority for request in requests))

    def abort(self, request_ids: Sequence[str]) -> None:
        """Remove requests before the next step."""
        self.run_between_steps(partial(self._abort, request_ids))

    def run_between_steps(self, command: Callable[[], None]) -> None:
        """Call a function in the engine's thread before the next step; an idle loop calls it at once."""
        self._commands.put(command)

    def close(self) -> None:
        """End the thread after the present step and the commands before this one."""
        self._commands.put(None)

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until the thread has ended; close() comes first."""
        self._thread.join(timeout_s)

    @property
    def stalled_s(self) -> float:
        """Return the seconds since the engine last came back from a step; 0 while it has nothing to do."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else self._clock() - since_s

    def _run(self, make_engine: "Callable[[], Engine]") -> None:
        try:
            self.engine = make_engine()
        except BaseException as failure:
            self._ready.set_exception(failure)
            return
        self._ready.set_result(None)
        try:
            while self._run_commands():
                self._before_step()
                if self.engine.has_work:
                    self._after_step(self.engine.step())
                else:
                    self._busy_since_s = None
        except BaseException as failure:
            self._on_failure(failure)

    def _run_commands(self) -> bool:
        """Run the queued commands, and wait for one while the engine is idle. Return False to end the loop."""
        if self._busy_since_s is not None:
            self._busy_since_s = self._clock()
        while self._busy_since_s is None or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            self._busy_since_s = self._clock()
            command()
        return True

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                self.engine.add(request)
            except RequestError as error:
                self._on_rejection(request, error)
                return

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.engine.abort(request_id)
