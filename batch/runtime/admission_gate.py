"""AdmissionGate: decides whether a shard may still start. Pure."""

from moray.batch.ledger import Command


class AdmissionGate:
    """Admits shards until the driver gives a command, and remembers which it admitted.

    command:  the driver's command for the stages; None while shards may start
    """

    def __init__(self) -> None:
        self.command: Command | None = None
        self._admitted: set[int] = set()

    @property
    def is_open(self) -> bool:
        """Return whether new shards may start."""
        return self.command is None

    def admit(self, shard: int) -> bool:
        """Return whether the shard may start, and remember it where it may."""
        if self.is_open:
            self._admitted.add(shard)
        return self.is_open

    @property
    def admitted(self) -> list[int] | None:
        """Return the shards that were admitted, once no more are; None before that."""
        return None if self.is_open else sorted(self._admitted)
