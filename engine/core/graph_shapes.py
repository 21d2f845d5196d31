"""The shapes of the CUDA graphs that steps run from, and the memory they need. No torch: memory is planned with this.

A graph has fixed numbers of tokens and sequences and a fixed width of the block table; a step runs in the next larger
one. A row of padding reads no experts and no keys. It is multiplied by the other weights, which takes no time up to
some 1,500 tokens, where a step waits for the experts to be read.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

MIN_TABLE_WIDTH = 64  # blocks in the narrowest block table; each wider table has 4 times as many
MAX_TOKENS = 2048  # of a graph: a larger step computes for longer than its kernels take to launch
MIXED_TOKENS = (64, 128, 256, 512, 768, 1024, 1536, MAX_TOKENS)
# Attention splits the keys of few sequences among more programs: steps with a 16th of all sequences have own graphs.
FEW_SEQS_DIVISOR = 16
MIN_FEW_SEQS = 16
MAX_GRAPHS = 64  # graphs kept at once; a new graph replaces the least recently used one
MIN_GRAPHS = 16  # with room for fewer, smaller steps get graphs and the largest ones get none
GRAPH_BYTES = 8 << 20  # estimate of the driver's memory per graph, which has a node for each of some 400 launches
# Decodes of at most so many sequences compute their logits in the graph too: in their short steps the host's time to
# launch the head counts, and the memory for the logits does not.
MAX_LOGITS_SEQS = 64
MAX_MEMORY_SHARE = 1 / 8  # maximum share of a GPU's remaining memory: on a small GPU fewer steps have graphs


class GraphShape(NamedTuple):
    """Holds the numbers of tokens and sequences of a graph, and the blocks in a row of its block table."""

    tokens: int
    seqs: int
    width: int

    @property
    def has_logits(self) -> bool:
        """Return whether the graph computes the logits of all its tokens."""
        return self.tokens == self.seqs <= MAX_LOGITS_SEQS


@dataclass(frozen=True)
class GraphShapes:
    """Says which steps run from graphs, and in which shapes. All ranks have the same.

    decode_sizes:  numbers of sequences, ascending, of the graphs with as many tokens as sequences
    few_seqs:      sequences of the smaller graphs for steps with prompts
    few_tokens:    numbers of tokens, ascending, of these
    many_seqs:     sequences of the larger graphs for steps with prompts
    many_tokens:   numbers of tokens, ascending, of these, above many_seqs
    widths:        blocks in a row of the block table, ascending
    max_graphs:    most graphs at once
    num_bytes:     estimate of the memory of all of them
    first_width:   that of most steps, as far as the lengths of sequences are known
    """

    decode_sizes: tuple[int, ...]
    few_seqs: int
    few_tokens: tuple[int, ...]
    many_seqs: int
    many_tokens: tuple[int, ...]
    widths: tuple[int, ...]
    max_graphs: int
    num_bytes: int
    first_width: int

    @property
    def max_tokens(self) -> int:
        """Return the tokens of the largest graph."""
        return max(*self.decode_sizes, *self.few_tokens, *self.many_tokens)

    @property
    def max_seqs(self) -> int:
        """Return the most sequences of any graph."""
        return max(shape.seqs for shape in self.of_width(self.widths[0]))

    @property
    def max_logits(self) -> int:
        """Return the tokens of the largest graph that computes logits; 0 = none does."""
        return max((shape.tokens for shape in self.of_width(self.widths[0]) if shape.has_logits), default=0)

    def find(self, num_tokens: int, num_seqs: int, width: int) -> GraphShape | None:
        """Return the shape in which a step runs; None = it has none. width: blocks of its longest sequence"""
        tokens = seqs = None
        if num_tokens > num_seqs and num_seqs <= self.few_seqs:
            tokens, seqs = round_up(num_tokens, self.few_tokens), self.few_seqs
        elif num_tokens > num_seqs and num_tokens > self.decode_sizes[-1]:
            tokens, seqs = round_up(num_tokens, self.many_tokens), self.many_seqs
        else:  # of few tokens, all may be sequences
            tokens = seqs = round_up(num_tokens, self.decode_sizes)
        width_or_none = round_up(width, self.widths)
        if tokens is None or seqs is None or seqs < num_seqs or width_or_none is None:
            return None
        return GraphShape(tokens, seqs, width_or_none)

    def of_width(self, width: int) -> list[GraphShape]:
        """Return the shapes of a width, largest first: smaller graphs then share the memory of larger ones."""
        pairs = {(size, size) for size in self.decode_sizes}
        pairs |= {(tokens, self.few_seqs) for tokens in self.few_tokens}
        pairs |= {(tokens, self.many_seqs) for tokens in self.many_tokens}
        return [GraphShape(tokens, seqs, width) for tokens, seqs in sorted(pairs, reverse=True)]

    @property
    def at_start(self) -> list[GraphShape]:
        """Return the shapes that are captured before the first step, largest first.

        They are those of first_width, then of the wider and last of the narrower tables, as far as all of a width have
        room; of first_width, as many as have.
        """
        num_widths = max(1, self.max_graphs // len(self.of_width(self.first_width)))
        first = self.widths.index(self.first_width)
        widths = [*self.widths[first:], *reversed(self.widths[:first])][:num_widths]
        shapes = sorted((shape for width in widths for shape in self.of_width(width)), reverse=True)
        return shapes[: self.max_graphs]


def choose_shapes(
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_blocks: int,
    available_bytes: int,
    pool_bytes: Callable[[int], int],
    mean_blocks: int | None = None,
) -> GraphShapes | None:
    """Choose the shapes for the limits of a step; None = there is no memory for graphs.

    max_blocks:       most cache blocks of a sequence
    available_bytes:  GPU memory that the model and its largest step leave
    pool_bytes:       returns the memory that the layers of a step of so many tokens share, as all graphs do
    mean_blocks:      of a running sequence, if known: the graphs of steps with sequences twice as long come first
    """
    budget = int(MAX_MEMORY_SHARE * max(0, available_bytes))
    largest = min(max_num_batched_tokens, MAX_TOKENS)
    mixed_tokens = [*(tokens for tokens in MIXED_TOKENS if tokens < largest), largest]
    sizes, widths = decode_sizes(max_num_seqs), table_widths(max_blocks)
    first_width = widths[0] if mean_blocks is None else round_up(2 * mean_blocks, widths) or widths[-1]
    few_seqs = max(MIN_FEW_SEQS, max_num_seqs // FEW_SEQS_DIVISOR)
    few_seqs = max_num_seqs if few_seqs * 2 >= max_num_seqs else few_seqs
    for most in sorted({*sizes, *mixed_tokens}, reverse=True):
        few_tokens = tuple(tokens for tokens in mixed_tokens if few_seqs <= tokens <= most)
        many_tokens = tuple(tokens for tokens in mixed_tokens if max_num_seqs < tokens <= most)
        many_tokens = () if few_seqs == max_num_seqs else many_tokens
        decodes = tuple(size for size in sizes if size <= most)
        shapes = GraphShapes(decodes, few_seqs, few_tokens, max_num_seqs, many_tokens, widths, 0, 0, first_width)
        pool = pool_bytes(most)
        num_graphs = min(MAX_GRAPHS, len(shapes.of_width(widths[0])) * len(widths))
        max_graphs = min(num_graphs, (budget - pool) // GRAPH_BYTES)
        if max_graphs >= min(MIN_GRAPHS, num_graphs):
            return replace(shapes, max_graphs=max_graphs, num_bytes=pool + max_graphs * GRAPH_BYTES)
    return None


def decode_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Return the numbers of sequences for which decodes have a graph, ascending.

    A step is padded to the next one: by at most 7 rows or a quarter of the step.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 512, 64)]
    sizes += range(512, 1 << 16, 128)
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def table_widths(max_blocks: int) -> tuple[int, ...]:
    """Return the block table widths that get a graph, ascending, in blocks.

    With a narrow table, attention splits the keys of short contexts among more programs.
    """
    widths = [MIN_TABLE_WIDTH]
    while widths[-1] < max_blocks:
        widths.append(widths[-1] * 4)
    return (*widths[:-1], min(widths[-1], max_blocks))


def round_up(n: int, sizes: tuple[int, ...]) -> int | None:
    """Return the smallest of the ascending `sizes` that is at least n; None if all are smaller."""
    index = bisect_left(sizes, n)
    return sizes[index] if index < len(sizes) else None
