"""MatrixNames: the published names of a family's matrices, as far as quantization and ranks ask. No torch."""

import re
from dataclasses import dataclass
from typing import Literal

# What part of a matrix's rows a rank has; see Partition.
Split = Literal["whole", "if even", "keys or values", "qkv", "equally"]


@dataclass(frozen=True)
class MatrixNames:
    """Holds patterns of the published names of modules with a matrix; a name matches as a whole.

    embedding:  the table of tokens
    router:     what scores the experts, in each layer
    head:       what computes the logits

    multiplied_together:  modules that match one of these, with the same text in its group, are weights that one kernel
                          multiplies: all are quantized, or none
    keys_or_values:       the projections to keys, and those to values, in attention
    qkv:                  what projects to queries, keys and values at once
    """

    embedding: str
    router: str
    head: str
    multiplied_together: tuple[str, ...] = ()
    keys_or_values: str = r".*\.[kv]_proj"
    qkv: str = r".*\.Wqkv"

    @property
    def patterns(self) -> tuple[str, str, str]:
        """Return the patterns of the matrices that are neither in attention nor in an expert."""
        return self.embedding, self.router, self.head

    def split(self, module: str) -> Split:
        """Return what part of the rows of a module's matrix a rank has."""
        splits: tuple[tuple[str, Split], ...] = (
            (self.embedding, "whole"),
            (self.router, "whole"),
            (self.head, "if even"),
            (self.keys_or_values, "keys or values"),
            (self.qkv, "qkv"),
        )
        return next((split for pattern, split in splits if re.fullmatch(pattern, module)), "equally")
