"""Check and measure everything on an NVIDIA GPU, in one command of at most nine minutes.

    python benchmarks/bench_gpu.py --out FOLDER [--stages compile,correctness,engine,kernels,ranks,peers,batch]
                                   [--minutes 9] [--resume FOLDER] [--fresh] [--vllm-site FOLDER] [--ray-site FOLDER]
                                   [--dry-run]

compile      every program, on all cores, into Triton's cache, where the others find it
correctness  every kernel against its reference at real shapes, the engine against itself (with and without graphs, in
             other batches, with quantized weights, after running out of memory), the kernels' tests
engine       models of full size with random weights: decode and mixed loads, beside their bounds and published figures;
             weights in int8, int4 and fp8; the limits that the engine chooses; an fp8 KV cache, if the engine has it
kernels      every kernel at 1 to 4,096 rows: percent of its bound, and its peers in the same run
ranks        a model split among ranks: tokens and logprobs bit by bit those of one rank; with several GPUs, which NCCL
             connects, the speed of decoding and of gathers too. Ranks that share one GPU gather through the host
peers        the same loads by vLLM and transformers
batch        `moray run` on local Ray compared with the engine alone

Stages are in the order of their worth. Each is a process of its own with a share of the time; it writes
FOLDER/<stage>.json after every single measurement, so that a stage that is stopped loses nothing, and after each stage
FOLDER/tables.md has all results so far. A second call with the same --out goes on with what is left; --resume brings
the results of a call on another machine. Needs torch, triton, transformers and safetensors; vLLM and Ray come from
folders of unpacked packages (benchmarks/README.md says how). A dry run does everything in tiny shapes on the CPU,
kernels under Triton's interpreter; it proves that the script runs, and measures nothing.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# name -> seconds of nine minutes
STAGES = {"compile": 40, "correctness": 110, "engine": 200, "kernels": 70, "ranks": 35, "peers": 60, "batch": 25}
NAMES = ("op", "engine", "gather", "ranks", "model", "weights", "kind", "check", "batch")
FIGURES = (
    "rows",
    "num_sequences",
    "us",
    "tokens_per_s",
    "percent_of_bound",
    "times bf16",
    "times plain",
    "max_num_seqs",
    "ok",
    "cost_percent",
    "times one rank",
    "compiled",
    "seconds",
)
LOG = "log.txt"  # of all stages
PR_SET_PDEATHSIG = 1  # of Linux
EXIT_S = 10  # seconds for a stage to exit after a signal
SPARE_S = 5  # seconds before the end of its time at which a stage stops by itself


def main() -> int:
    args = parse_arguments()
    if args.stage:
        run_stage(args.stage, args)
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(124))  # and so end the stage that runs
    sys.path.insert(0, str(HERE))
    from gpu.progress import Progress, bring

    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume is not None:
        bring(args.resume, args.out)
    progress = Progress(args.out)
    for name in STAGES if args.fresh else ():
        progress.restart(name)
    context = write_context(args)
    left = [name for name in args.stages if not progress.is_finished(name)]
    if left == ["compile"] != args.stages:  # for nothing: all others are finished
        left = []
    end = time.time() + 60 * args.minutes
    missing = []
    for i, name in enumerate(left):
        # time that a stage does not use is divided among the remaining ones
        limit_s = (end - time.time()) * STAGES[name] / sum(STAGES[other] for other in left[i:])
        if start_stage(name, args, limit_s):
            progress.finish(name)
        if not progress.is_finished(name):
            missing.append(name)
        show(args.out / f"{name}.json")
        draw(args, context)
    return summarize(args, context, missing)


def draw(args: argparse.Namespace, context: dict[str, Any]) -> Path:
    """Write the tables of all results so far."""
    from gpu.table import write_tables

    return write_tables(args.out, list(STAGES), context)


def summarize(args: argparse.Namespace, context: dict[str, Any], missing: list[str]) -> int:
    """Say what is wrong and what is missing; return the exit code, 0 where neither is."""
    from gpu.progress import rows_of

    wrong = [row["check"] for name in args.stages for row in rows_of(args.out, name) if row.get("ok") is False]
    print(f"\nResults are in {args.out}, drawn in {draw(args, context)}")
    if args.dry_run:
        print("This was a dry run: its figures say nothing about speed.")
    if wrong:
        print(f"WRONG: {'; '.join(wrong)}")
    if missing:
        print(f"Not finished: {', '.join(missing)}. The same command goes on with them.")
    return 1 if wrong or missing else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES), metavar="NAME,NAME")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="results of an earlier call, which stay")
    parser.add_argument("--fresh", action="store_true", help="forget what is there, and measure again")
    parser.add_argument(
        "--vllm-site", type=Path, help="folder with vLLM and what it needs beyond this Python's packages"
    )
    parser.add_argument("--ray-site", type=Path, help="the same for Ray")
    parser.add_argument("--commit", default="", help="of this tree, where it was copied without its .git")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # in a stage's own process
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [name for name in args.stages if name not in STAGES]:
        parser.error(f"--stages: no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    args.out = args.out.resolve()
    args.resume = args.resume and args.resume.resolve()
    return args


def start_stage(name: str, args: argparse.Namespace, limit_s: float) -> bool:
    """Run a stage in a process of its own, and stop it when its time is over. Returns whether it succeeded."""
    print(f"\n{name}: at most {limit_s:.0f} s", flush=True)
    command = [sys.executable, str(HERE / "bench_gpu.py"), "--out", str(args.out), "--stage", name]
    command += ["--deadline", str(time.time() + limit_s - SPARE_S)]
    for option, value in (("--vllm-site", args.vllm_site), ("--ray-site", args.ray_site)):
        command += [option, str(value.resolve())] if value else []
    environment = dict(os.environ)
    if args.dry_run:
        command.append("--dry-run")
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (args.out / LOG).open("a+") as log:
        begin = log.tell()
        code = run_for(command, limit_s, log, environment)
    if code:
        tail = (args.out / LOG).read_bytes()[begin:].decode(errors="replace")[-1500:]
        print(f"{name} {'was stopped' if code == 124 else f'ended with {code}'}:\n{tail}", flush=True)
    return code == 0


def run_for(command: list[str], limit_s: float, log: IO[str], environment: dict[str, str]) -> int:
    """Run a command for limit_s seconds at most. Returns its exit code; 124 where it was stopped."""
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # with SIGTERM it ends the processes that it started
            if process.poll() is None:
                os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(EXIT_S)


def run_stage(name: str, args: argparse.Namespace) -> None:
    """Run a stage in this process."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(124))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # a call that is killed leaves no stage behind
    sys.path[:0] = [str(HERE), str(ROOT / "src")]
    if args.dry_run:
        sys.path.append(str(ROOT / "tests"))
        importlib.import_module("triton_device")  # the interpreter, repaired
    from gpu.progress import is_final, rows_of
    from gpu.setup import Results, Setup

    done = [row for row in rows_of(args.out, name) if is_final(row)] if name != "compile" else []
    setup = Setup(args.out, args.deadline, args.dry_run, args.vllm_site, args.ray_site, done)
    results = Results(args.out / f"{name}.json", done)
    for row in importlib.import_module(f"gpu.stage_{name}").run(setup):
        results.add(row)


def write_context(args: argparse.Namespace) -> dict[str, Any]:
    """Write commit, command, GPU and versions into context.json: the other files hold only rows.

    Raises SystemExit where the folder has rows of another commit, GPU or version.
    """
    import report
    import torch
    from gpu.progress import check_same

    found: dict[str, Any] = report.context("torch", "triton", "transformers", "safetensors")
    found["commit"] = found["commit"] or args.commit
    found["command"] = shlex.join(["python", *sys.argv])
    found["dry_run"] = args.dry_run
    found["card"] = None
    if torch.cuda.is_available() and not args.dry_run:
        properties = torch.cuda.get_device_properties(0)
        found["card"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    if (other := check_same(args.out, found)) is not None and not args.fresh:
        raise SystemExit(f"{other}; give another --out, or --fresh to measure again.")
    (args.out / "context.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def show(path: Path) -> None:
    """Print each row of a result in a few words."""
    rows = json.loads(path.read_text()) if path.exists() else []
    for row in rows:
        cells = [str(value) for name, value in row.items() if name in NAMES]
        cells += [f"{name} {value}" for name, value in row.items() if name in FIGURES or name.endswith("times ours")]
        print(
            "  "
            + "  ".join(
                cells + [str(row[name])[:200] for name in ("error", "raised") if name in row and "ok" not in row]
            )
        )
    wrong = [row for row in rows if row.get("ok") is False]
    for row in wrong:
        print(f"  WRONG: {json.dumps(row)[:400]}")


if __name__ == "__main__":
    sys.exit(main())
