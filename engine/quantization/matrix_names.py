"""MatrixNames: the published names of a family's matrices that are neither in attention nor in an expert. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixNames:
    """Holds patterns of the published names of modules with a matrix; a name matches as a whole.

    embedding:  the table of tokens
    router:     what scores the experts, in each layer
    head:       what computes the logits
    """

    embedding: str
    router: str
    head: str

    @property
    def patterns(self) -> tuple[str, str, str]:
        """Return the patterns of all of them."""
        return self.embedding, self.router, self.head
