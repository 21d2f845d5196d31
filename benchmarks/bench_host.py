"""Measure the host's CPU time for a step of the GPU engine, on any machine: what a GPU would do is left out.

    python benchmarks/bench_host.py [--rows "decode 32,mixed 256 eager,..."] [--steps 100] [--rounds 3]
                                    [--beside CHECKOUT] [--quick]

A row is a kind of step: `decode` or `mixed` (prompts beside the decodes), the sequences, and options: `eager` (without
CUDA graphs, and what a layer takes to launch), `stops` (each request has stop strings). Requests sample with a
temperature and top_p. The model is tiny, with the proportions of Phi-3.5-MoE: the host's time does not depend on sizes.

The engine is the real one, with a stand-in for the GPU (gpu/stand_in.py): kernels are bound and specialized, their
launch, some 4 us each, is dropped. Tensors are in the host's memory. A figure is CPU time of the engine's thread: the
mean of the tenth of the steps that took least, of the round in which that is least. Parts are timed in other steps than
the total, because their clocks take some 50 us a step. On a machine that does other work
only the ratio to another commit means something: --beside runs that of a checkout with a .venv, in turns with this one.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import report
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
OURS = "moray"
ROWS = (
    "decode 1", "decode 32", "decode 256", "decode 256 stops", "mixed 256", "mixed 256 eager", "decode 32 eager",
)  # fmt: skip

console = Console(highlight=False)


class Contender:
    """Runs run_host.py with the moray of one checkout, and asks it for rows."""

    def __init__(self, python: Path, num_steps: int) -> None:
        command = [str(python), str(HERE / "run_host.py"), str(num_steps)]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # kernels only launch
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def measure(self, row: str) -> dict[str, Any]:
        """Measure a row, and return what run_host.py prints for it."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(row + "\n")
        process.stdin.flush()
        if not (line := process.stdout.readline()):
            raise SystemExit(f"run_host.py ended with {process.wait()} in the row {row!r}")
        result: dict[str, Any] = json.loads(line)
        return result

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def main() -> None:
    args = parse_arguments()
    pythons = {OURS: Path(sys.executable)}
    if args.beside:
        checkout = args.beside.resolve()
        pythons[f"{OURS} at {report.commit(checkout)}"] = checkout / ".venv" / "bin" / "python"
    contenders = {name: Contender(python, args.steps) for name, python in pythons.items()}
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in args.rows:
        with console.status(row):
            rounds = [{name: one.measure(row) for name, one in contenders.items()} for _ in range(args.rounds)]
        rows[row] = {name: min((r[name] for r in rounds), key=lambda r: float(r["ms"]["total"])) for name in contenders}
        show(row, rows[row])
    for contender in contenders.values():
        contender.close()
    if not args.quick:
        result = report.context("torch", "triton") | {"steps": args.steps, "rounds": args.rounds, "rows": rows}
        console.print(f"Saved {report.save('bench_host', 'cpu', result).relative_to(report.ROOT)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda s: s.split(","), default=ROWS, metavar="ROW,ROW")
    parser.add_argument("--steps", type=int, default=100, help="steps of a row in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another commit of moray")
    parser.add_argument("--quick", action="store_true", help="one round of few steps, nothing saved")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rounds = 10, 1
    return args


def show(row: str, results: dict[str, dict[str, Any]]) -> None:
    """Print a row: the milliseconds of a step and of its parts."""
    table = Table(title=f"{row}, ms", title_justify="left")
    for column in ("", *results, "ours takes"):
        table.add_column(column, justify="right")
    for part, ours in results[OURS]["ms"].items():
        theirs = list(results.values())[-1]["ms"][part]
        table.add_row(
            part, *(f"{result['ms'][part]:.3f}" for result in results.values()),
            f"{ours / theirs:.2f}x" if theirs else "",
        )  # fmt: skip
    if "launch_us_a_layer" in results[OURS]:
        table.add_row("us a layer", *(str(result["launch_us_a_layer"]) for result in results.values()), "")
    table.add_row("from graphs", *(f"{result['from_graph']:.0%}" for result in results.values()), "")
    console.print(table)


if __name__ == "__main__":
    main()
