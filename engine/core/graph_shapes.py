"""The shapes of the CUDA graphs for decode steps, and the memory they need. No torch: memory is planned with this."""

from bisect import bisect_left

MIN_TABLE_WIDTH = 64  # blocks in the narrowest block table; each wider table has 4 times as many
MAX_GRAPHS = 64  # graphs kept at once; a new graph replaces the least recently used one
ALL_GRAPHS_BYTES = 1 << 29  # estimate of the memory that all graphs share, mostly for attention of the largest graph
GRAPH_BYTES = 8 << 20  # estimate of the driver's memory per graph, which has a node for each of some 400 launches
MAX_MEMORY_SHARE = 0.1  # maximum share of a GPU's remaining memory: a small GPU runs small models with small graphs


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes that get a graph, ascending.

    A step is padded to the next size: by at most 7 rows or a quarter of the step. Padding reads no experts and no keys.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 1 << 16, 64)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


def table_widths(max_blocks: int) -> list[int]:
    """Return the block table widths that get a graph, ascending, in blocks.

    With a narrow table, attention splits the keys of short contexts among more programs.
    """
    widths = [MIN_TABLE_WIDTH]
    while widths[-1] < max_blocks:
        widths.append(widths[-1] * 4)
    return [*widths[:-1], min(widths[-1], max_blocks)]


def round_up(n: int, sizes: list[int]) -> int:
    """Return the smallest of the ascending `sizes` that is at least n."""
    return sizes[bisect_left(sizes, n)]


def graphs_bytes(max_num_seqs: int, max_blocks: int, available_bytes: int) -> int:
    """Return how many bytes to reserve for graphs.

    available_bytes: GPU memory that the model and its largest step leave
    """
    num_graphs = min(MAX_GRAPHS, len(graph_sizes(max_num_seqs)) * len(table_widths(max_blocks)))
    return min(ALL_GRAPHS_BYTES + num_graphs * GRAPH_BYTES, int(MAX_MEMORY_SHARE * max(0, available_bytes)))
