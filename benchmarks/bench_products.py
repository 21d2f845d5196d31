"""Compare our products with quantized weights on the CPU with our products with bf16 weights, in one run.

    python benchmarks/bench_products.py [--kinds int8,int4:128] [--rows 1,4,16,64] [--threads 1,2] [--save]

Shapes are those of the experts of the benchmark's model and of Phi-3.5-MoE; rows are bf16. Weights are in huge pages
and used in turn from more memory than the caches hold. The kinds alternate. With N threads, N threads multiply at the
same time, each with weights of its own, as experts do. Times are CPU times of the threads, which other processes
disturb less: medians of the rounds, and medians of each round's ratio to bf16. GB/s counts the codes and scales that
all threads together read; the row "read" only reads the bytes of int8 codes, as a bound.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import report
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moray.kernels.cpu.linear import linear, pack
from moray.kernels.cpu.linear_mistakes import Quantization, make_quantized, make_weight
from moray.kernels.cpu.quantized import pack_quantized, quantized_linear
from moray.kernels.cpu.quantized_panels import ZERO

SHAPES = ((3200, 1024), (1024, 1600), (6400, 4096), (1024, 4096))  # out, in
BASE = "bf16"
READ = "read"
LARGEST = 3.8  # the largest of some thousand normal numbers, in standard deviations, which gets the largest code

Product = Callable[[Tensor], Any]


@dataclass
class Contender:
    """Holds the copies of a weight of one kind.

    products:   multiplies rows with one copy, for each copy
    num_bytes:  bytes of one copy
    next:       number of the copy that is used next
    """

    products: list[Product]
    num_bytes: int
    next: int = 0

    def run(self, x: Tensor, seconds: float, first: int, step: int) -> tuple[float, int]:
        """Multiply for some seconds with every `step`-th copy; return CPU seconds a call and the number of calls."""
        calls, started = 0, time.thread_time()
        while True:
            self.products[(first + calls * step) % len(self.products)](x)
            calls += 1
            spent = time.thread_time() - started
            if calls >= 2 and spent > seconds:
                return spent / calls, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="int8,int4:128", help="such as int8, int4:128 (groups of 128), fp8")
    parser.add_argument("--rows", type=_numbers, default=[1, 4, 16, 64])
    parser.add_argument("--threads", type=_numbers, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.03, help="a contender's turn")
    parser.add_argument("--megabytes", type=int, default=200, help="of weights of each kind; more than the caches")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with torch.inference_mode():
        for shape in SHAPES:
            contenders = make_contenders(shape, args.kinds.split(","), args.megabytes * 1e6)
            for num_threads in args.threads:
                for num_rows in args.rows:
                    results += measure(contenders, shape, num_rows, num_threads, args.rounds, args.seconds)
    show(results)
    if args.save:
        print(report.save("products", "cpu", report.context("torch", "numba", "llvmlite") | {"products": results}))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def make_contenders(shape: tuple[int, int], kinds: list[str], num_bytes: float) -> dict[str, Contender]:
    """Return a contender for bf16 and for each kind, with copies of about `num_bytes` together.

    shape: (out_features, in_features)
    """

    def copies(make: Callable[[], tuple[Product, int]]) -> Contender:
        first, size = make()
        return Contender([first, *(make()[0] for _ in range(max(3, int(num_bytes / size))))], size)

    weight = make_weight(*shape, torch.bfloat16)

    def make_base() -> tuple[Product, int]:
        packed = pack(weight)
        return lambda x: linear(x, packed), packed.weight.nbytes

    found = {BASE: copies(make_base)}
    for name in kinds:
        kind, _, group = name.partition(":")
        made_up = _with_normal_codes(
            make_quantized(*shape, Quantization(kind, int(group) if group else shape[1], False))
        )

        def make_one(made_up: Any = made_up) -> tuple[Product, int]:
            packed = pack_quantized(*made_up)
            return lambda x: quantized_linear(x, packed), packed.codes.nbytes + packed.scales.nbytes

        found[name] = copies(make_one)

    def make_read() -> tuple[Product, int]:
        codes = pack_quantized(*make_quantized(*shape, Quantization("int8", shape[1], False))).codes
        words = codes.view(-1).view(torch.int64).numpy()
        return lambda x: read(words), codes.nbytes

    found[READ] = copies(make_read)
    return found


def _with_normal_codes(made_up: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace integer codes, all as likely, by those of a normal distribution, as those of real weights are."""
    codes, *rest, kind = made_up
    if kind not in ("int8", "int4"):
        return made_up
    limit = ZERO[kind]
    normal = torch.randn(codes.shape, generator=torch.Generator().manual_seed(0)) * (limit / LARGEST)
    return normal.round().clamp(-limit, limit - 1).to(torch.int8), *rest, kind


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def read(words: Any) -> Any:
    """Combine all words of an array, so that they must be read."""
    combined = np.int64(0)
    for word in words:
        combined ^= word
    return combined


def measure(
    contenders: dict[str, Contender], shape: tuple[int, int], num_rows: int, num_threads: int, rounds: int, turn: float
) -> list[dict[str, Any]]:
    """Run the contenders in turns; return a row of figures for each.

    turn: CPU seconds of a contender's turn
    """
    x = torch.randn(num_rows, shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.run(x, 0.0, 0, 1)
    for _ in range(rounds):
        for name, contender in contenders.items():
            found: list[tuple[float, int]] = []

            def work(offset: int, contender: Contender = contender, found: list[tuple[float, int]] = found) -> None:
                found.append(contender.run(x, turn, contender.next + offset, num_threads))

            threads = [threading.Thread(target=work, args=(offset,)) for offset in range(1, num_threads)]
            for thread in threads:
                thread.start()
            work(0)
            for thread in threads:
                thread.join()
            contender.next += num_threads * max(calls for _, calls in found)
            times[name].append(len(found) / sum(1 / seconds for seconds, _ in found))
    return [
        {
            "out_features": shape[0],
            "in_features": shape[1],
            "rows": num_rows,
            "threads": num_threads,
            "weights": name,
            "us": statistics.median(of_name) * 1e6,
            "gb_per_s": num_threads * contenders[name].num_bytes / statistics.median(of_name) / 1e9,
            "speedup": statistics.median(b / t for b, t in zip(times[BASE], of_name, strict=True)),
        }
        for name, of_name in times.items()
    ]


def show(results: list[dict[str, Any]]) -> None:
    table = Table(title="products of bf16 rows with packed weights", title_justify="left")
    for name in ("weight", "threads", "rows", "kind", "us", "GB/s", "bf16 / this"):
        table.add_column(name, justify="left" if name in ("weight", "kind") else "right")
    for row in results:
        table.add_row(
            f"[{row['out_features']}, {row['in_features']}]".replace("[", "\\["),
            str(row["threads"]),
            str(row["rows"]),
            row["weights"],
            f"{row['us']:.1f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['speedup']:.2f}",
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
