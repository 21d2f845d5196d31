"""MatrixNames: the published names of a family's matrices, as far as quantization depends on them. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixNames:
    """Holds patterns of the published names of modules with a matrix; a name matches as a whole.

    embedding:  the table of tokens
    router:     what scores the experts, in each layer
    head:       what computes the logits

    multiplied_together:  modules that match one of these, with the same text in its group, are weights that one kernel
                          multiplies: all are quantized, or none
    """

    embedding: str
    router: str
    head: str
    multiplied_together: tuple[str, ...] = ()

    @property
    def patterns(self) -> tuple[str, str, str]:
        """Return the patterns of the matrices that are neither in attention nor in an expert."""
        return self.embedding, self.router, self.head
