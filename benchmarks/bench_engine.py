"""Compare the engine with its peers on the CPU: useful output tokens/s of a random bf16 model of 0.7 G parameters.

    python benchmarks/bench_engine.py [--shape phi|qwen3|granite|olmoe|qwen2|gpt_oss]
                                      [--requests 1,16,64] [--rounds 3] [--peers all|none|transformers|llama]
                                      [--ways static/eager/float32,...] [--max-tokens 16]
                                      [--quantization int8,int4,fp8] [--ranks 2 [--expert-parallel]]
                                      [--beside CHECKOUT] [--quick]

All contenders run in one command with the same number of threads, each in a process of its own, after a warm-up, in
turns: one round of each, then the next. Requests have 16..128 prompt and 8..96 output tokens; all arrive at once. After
the first round only the fastest way of running transformers continues; ways that reach less than half of its speed are
left out at the next size. On a busy machine set OMP_WAIT_POLICY=PASSIVE for all: otherwise threads that spin while they
wait decide the result.

--ranks adds the engine with its model split among so many processes, which share the threads; --expert-parallel also
with whole experts in each of them.

--beside compares with another commit of this repository: a checkout with a .venv of its own.

--shape chooses the family whose proportions the model has (shapes.py).

llama.cpp needs llama-cpp-python, best in an environment of its own (it is built from source, in some 15 minutes), and
in this one the package gguf, which writes its model file (write_gguf.py):

    python3 -m venv ~/.cache/moray/llama && ~/.cache/moray/llama/bin/pip install llama-cpp-python
    .venv/bin/python -m pip install gguf
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report
import shapes
from contender import Contender, Round, TooSlow, make_work
from rich.console import Console
from rich.table import Table
from write_gguf import write_gguf

from moray.engine.quantization.scheme import ON_LOAD_KINDS

HERE = Path(__file__).resolve().parent
LLAMA_PYTHON = Path.home() / ".cache" / "moray" / "llama" / "bin" / "python"
OURS = "moray"
TRANSFORMERS = [f"static/{experts}" for experts in ("eager", "batched_mm", "grouped_mm")] + ["continuous/grouped_mm"]
# Torch multiplies bf16 a row at a time on a CPU without instructions for it, and reads twice the bytes faster.
TRANSFORMERS += [f"static/{experts}/float32" for experts in ("eager", "grouped_mm")]
LLAMA = "llama.cpp"
LLAMA_FORMATS = {"int8": "Q8_0", "int4": "Q4_K_M"}  # llama.cpp's formats of as many bits
WARM_UP_TOKENS = 4
NOISY = 0.05  # share of the CPUs that others may use before a round counts as disturbed

console = Console(highlight=False)


def main() -> None:
    args = parse_arguments()
    contenders: dict[str, Contender] = {}
    try:
        folder = shapes.write(args.shape, args.folder)
        contenders = start(args, folder)
        infos = {name: contender.info for name, contender in contenders.items()}
        sizes = {}
        for size in args.requests:
            sizes[size] = race(contenders, size, args.rounds, args.limit, args.max_tokens)
            show(size, sizes[size])
            drop_hopeless(contenders, sizes[size])
        memory = show_memory(contenders[OURS], sizes)
    except shapes.UnknownFamily as error:
        raise SystemExit(f"--shape {args.shape}: {error}") from None
    finally:
        for contender in contenders.values():
            contender.close()
    if args.quick:
        return
    result = report.context("torch", "transformers") | {
        "shape": args.shape,
        "threads": args.threads,
        "parameters": shapes.num_parameters(folder),
        "contenders": infos,
        "memory": memory,
        "requests": {size: summarize(rounds) for size, rounds in sizes.items()},
    }
    name = "bench_engine" if args.shape == shapes.PHI else f"bench_engine-{args.shape}"
    console.print(f"Saved {report.save(name, 'cpu', result).relative_to(report.ROOT)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.NAMES, default=shapes.PHI, help="the model's family; see shapes.py")
    parser.add_argument("--requests", type=lambda s: [int(n) for n in s.split(",")], default=[1, 16, 64], metavar="N,N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", choices=["all", "none", "transformers", "llama"], default="all")
    parser.add_argument(
        "--ways",
        default=TRANSFORMERS,
        metavar="WAY,WAY",
        type=lambda s: s.split(","),
        help=f"of running transformers: some of {', '.join(TRANSFORMERS)}",
    )
    parser.add_argument(
        "--quantization",
        default=[],
        metavar="KIND,KIND",
        type=lambda s: s.split(","),
        help="int8, int4, fp8: also with weights of so few bits, and llama.cpp with its formats of as many",
    )
    parser.add_argument(
        "--ranks", type=int, choices=[2, 4, 8], help="also in so many processes, in bf16 and --quantization"
    )
    parser.add_argument("--expert-parallel", action="store_true", help="with --ranks: also with whole experts in each")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another commit of moray, in bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120, metavar="S", help="a peer's round may take; then it is out")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="output tokens of a request, at most; for slow peers"
    )
    parser.add_argument("--quick", action="store_true", help="16 requests, one round, nothing saved")
    parser.add_argument("--folder", type=Path, help="where the model is kept (default: the cache)")
    parser.add_argument("--llama-python", type=Path, default=LLAMA_PYTHON, help="interpreter that has llama_cpp")
    args = parser.parse_args()
    if args.quick:
        args.requests, args.rounds = [16], 1
    if unknown := [kind for kind in args.quantization if kind not in ON_LOAD_KINDS]:
        parser.error(f"--quantization: {', '.join(unknown)}; it can be {', '.join(ON_LOAD_KINDS)}")
    if unknown := [way for way in args.ways if way not in TRANSFORMERS]:
        parser.error(f"--ways: {', '.join(unknown)}; it can be {', '.join(TRANSFORMERS)}")
    if args.expert_parallel and not args.ranks:
        parser.error("--expert-parallel: needs --ranks")
    if max(args.requests) > 64:
        parser.error(f"--requests: at most 64 at once, got {max(args.requests)}")
    return args


def start(args: argparse.Namespace, folder: Path) -> dict[str, Contender]:
    """Start the contenders that can run, and load their models one after the other; our engine comes first."""
    threads = str(args.threads)
    ours = [sys.executable, str(HERE / "run_moray.py"), str(folder), threads]
    commands = {OURS: ours} | {f"{OURS} {kind}": [*ours, kind] for kind in args.quantization}
    if args.ranks:
        split = {f"{name}, {args.ranks} ranks": [*run, "--ranks", str(args.ranks)] for name, run in commands.items()}
        whole = {f"{name} of whole experts": [*run, "--expert-parallel"] for name, run in split.items()}
        commands |= split | (whole if args.expert_parallel else {})
    if args.beside:
        checkout = args.beside.resolve()
        other = [str(checkout / ".venv" / "bin" / "python"), str(checkout / "benchmarks" / "run_moray.py")]
        commands[f"{OURS} at {report.commit(checkout)}"] = [*other, str(folder), threads]
    if args.peers in ("all", "transformers"):
        script = str(HERE / "run_transformers.py")
        commands |= {mode: [sys.executable, script, str(folder), threads, mode] for mode in args.ways}
    if args.peers in ("all", "llama") and (python := find_llama(args.llama_python)):
        try:
            theirs = [python, str(HERE / "run_llama_cpp.py"), str(write_gguf(folder)), threads]
            formats = [LLAMA_FORMATS[kind] for kind in args.quantization if kind in LLAMA_FORMATS]
            commands |= {LLAMA: theirs} | {f"{LLAMA} {name}": [*theirs, name] for name in formats}
        except ImportError:
            console.print("llama.cpp is left out: `pip install gguf` to write its model file.")
    logs = Path(tempfile.mkdtemp(prefix="moray-bench-"))
    contenders = {}
    with console.status("loading") as status:
        for name, command in commands.items():
            status.update(f"loading {name}")
            log = logs / f"{name.replace('/', '-').replace(' ', '-')}.log"
            contenders[name] = Contender(name, command, args.threads, log)
            contenders[name].wait_ready()
    return contenders


def find_llama(python: Path) -> str | None:
    """Return an interpreter that has llama_cpp, the given one if it has; None where there is none."""
    for candidate in (str(python), sys.executable):
        if Path(candidate).exists():
            tried = subprocess.run([candidate, "-c", "import llama_cpp"], capture_output=True, check=False)
            if tried.returncode == 0:
                return candidate
    console.print(f"llama.cpp is left out: no llama_cpp in {python} (see --help on how to install it).")
    return None


Rounds = dict[str, list[Round]]  # contender -> its rounds


def race(
    contenders: dict[str, Contender], size: int, num_rounds: int, limit_s: float, max_tokens: int | None
) -> Rounds:
    """Warm up every contender, then run them in turns. Removes those that are too slow from `contenders`."""
    rounds: Rounds = {}
    with console.status("") as status:
        for n in range(-1, num_rounds):
            slower = [mode for mode in TRANSFORMERS if mode != fastest(rounds)] if n > 0 else []
            for name in [name for name in contenders if name not in slower]:
                status.update(f"{size} requests, {f'round {n + 1} of {num_rounds}' if n >= 0 else 'warm-up'}: {name}")
                work = make_work(size, n, max_tokens if n >= 0 else WARM_UP_TOKENS)
                try:
                    result = contenders[name].run(work, math.inf if name.startswith(OURS) else limit_s)
                except TooSlow as error:
                    contenders.pop(name).close()
                    console.print(f"{error}: below {sum(w.max_tokens for w in work) / limit_s:.1f} tokens/s")
                    continue
                if n >= 0:
                    rounds.setdefault(name, []).append(result)
    return rounds


def best(rounds: list[Round]) -> float:
    """Return the tokens/s of the fastest round."""
    return max(r.tokens_per_s for r in rounds)


def best_by_cpu(rounds: list[Round]) -> float:
    """Return the most tokens per CPU second of a round."""
    return max(r.tokens_per_cpu_s for r in rounds)


def fastest(rounds: Rounds) -> str | None:
    """Return the fastest way of running transformers."""
    modes = [mode for mode in TRANSFORMERS if rounds.get(mode)]
    return max(modes, key=lambda mode: best(rounds[mode]), default=None)


def drop_hopeless(contenders: dict[str, Contender], rounds: Rounds) -> None:
    """Close the ways of running transformers that reach less than half of the fastest one's speed."""
    if leader := fastest(rounds):
        for mode in [m for m in TRANSFORMERS if m in contenders and best(rounds[m]) < best(rounds[leader]) / 2]:
            contenders.pop(mode).close()


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Return the mean share of a request's tokens before the first that differs."""
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        shares.append(same / len(a))
    return statistics.mean(shares)


def summarize(rounds: Rounds) -> dict[str, Any]:
    """Return the figures of one number of requests, for the file."""
    return {
        name: {
            "best_tokens_per_s": round(best(own), 2),
            "best_tokens_per_cpu_s": round(best_by_cpu(own), 2),
            "ours_over_it_by_cpu": round(best_by_cpu(rounds[OURS]) / best_by_cpu(own), 3),
            "median_tokens_per_s": round(statistics.median(r.tokens_per_s for r in own), 2),
            "ours_over_it": round(best(rounds[OURS]) / best(own), 3),
            "same_tokens_as_ours": round(agreement(rounds[OURS][0].tokens, own[0].tokens), 3),
            "rounds": [
                {
                    "seconds": round(r.seconds, 3),
                    "tokens": sum(map(len, r.tokens)),
                    "tokens_per_s": round(r.tokens_per_s, 2),
                    "cpu_seconds": round(r.cpu_s, 2),
                    "cpu_share_of_others": round(r.others, 3),
                    **r.facts,
                }
                for r in own
            ],
        }
        for name, own in rounds.items()
    }


def show(size: int, rounds: Rounds) -> None:
    """Print the figures of one number of requests as a table."""
    tokens = sum(map(len, rounds[OURS][0].tokens))
    table = Table(title=f"{size} requests, {tokens:,} output tokens: tokens/s", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("best", "median", "rounds", "moray is", "by CPU time", "same tokens", "CPU of others"):
        table.add_column(column, justify="right")
    for name, figures in summarize(rounds).items():
        table.add_row(
            f"{name} *" if name == fastest(rounds) else name,
            f"{figures['best_tokens_per_s']:.1f}",
            f"{figures['median_tokens_per_s']:.1f}",
            str(len(rounds[name])),
            f"{figures['ours_over_it']:.2f}x",
            f"{figures['ours_over_it_by_cpu']:.2f}x",
            f"{figures['same_tokens_as_ours']:.0%}",
            f"{max(r.others for r in rounds[name]):.0%}",
        )
    console.print(table)
    if fastest(rounds):
        console.print(
            "* the fastest way of running transformers; same tokens: up to the first that differs from moray's"
        )
    facts = rounds[OURS][-1].facts
    share, hit = facts["experts_share"], facts["experts_hit"]  # None = graphs replayed the steps
    seen = [] if share is None else [f"experts take {share:.0%} of the time"]
    seen += [] if hit is None else [f"a step of {size} tokens uses {hit:.1f} of {facts['experts']} experts a layer"]
    console.print("; ".join([f"moray: {facts['steps']} steps", *seen]))
    for name, own in rounds.items():
        if len(shares := own[-1].facts.get("rank_rows", ())) > 1:
            console.print(f"{name}: their shares of the experts' rows are {', '.join(f'{s:.1%}' for s in shares)}")
    if any(r.others > NOISY for own in rounds.values() for r in own):
        console.print("[yellow]Other processes used the CPUs meanwhile: these figures are not of a quiet machine.[/]")


def show_memory(ours: Contender, sizes: dict[int, Rounds]) -> dict[str, Any]:
    """Print and return how much anonymous memory grew from before loading to its peak.

    It is divided by the size of weights and KV cache.
    """
    before, expected = ours.info["anon_before"], ours.info["weights_and_cache"]
    in_rounds = max(r.peak_anon for rounds in sizes.values() for r in rounds[OURS])
    memory = {
        "weights_and_cache_bytes": expected,
        "growth_while_loading": round((ours.load_peak_anon - before) / expected, 3),
        "growth_while_running": round((in_rounds - before) / expected, 3),
    }
    console.print(
        f"moray's anonymous memory grew by {memory['growth_while_running']:.2f}x of weights + KV cache "
        f"({expected / 1e9:.2f} GB) while running, {memory['growth_while_loading']:.2f}x while loading"
    )
    return memory


if __name__ == "__main__":
    main()
