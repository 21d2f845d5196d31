"""A display for tests."""

from typing import Any


class Watcher:
    """A display that keeps what it is shown."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.statuses: list[Any] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def update(self, status: Any) -> None:
        self.statuses.append(status)
