"""Check and measure everything on an NVIDIA GPU, in one command of at most nine minutes.

    python benchmarks/bench_gpu.py --out FOLDER [--stages compile,correctness,ranks,kernels,engine,peers,batch]
                                   [--minutes 9] [--vllm-site FOLDER] [--ray-site FOLDER] [--dry-run]

compile      every program, on all cores, into Triton's cache, where the others find it
correctness  every kernel against its reference at real shapes, the kernels' tests, the engine against itself
ranks        a model split among ranks: tokens and logprobs bit by bit those of one rank; with several GPUs, which NCCL
             connects, the speed of decoding too. Ranks that share one GPU gather through the host
kernels      every kernel at 1 to 4,096 rows: percent of its bound, and its peers in the same run
engine       Phi-3.5-MoE, phixtral and Mixtral of full size with random weights: decode and mixed loads; the first also
             with weights in int8, int4 and fp8, and with activations in fp8
peers        the same loads by vLLM and transformers
batch        `moray run` on local Ray compared with the engine alone

Each stage is a process of its own with a share of the time; it writes FOLDER/<stage>.json after every single
measurement, so that a stage that is stopped loses nothing. Needs torch, triton, transformers and safetensors; vLLM
and Ray come from folders of unpacked packages (benchmarks/README.md says how). A dry run does everything in tiny
shapes on the CPU, kernels under Triton's interpreter; it proves that the script runs, and measures nothing.
"""

import argparse
import contextlib
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
STAGES = {"compile": 40, "correctness": 110, "ranks": 40, "kernels": 75, "engine": 175, "peers": 75, "batch": 25}
NAMES = ("op", "engine", "model", "weights", "kind", "check", "batch")
FIGURES = (
    "rows",
    "num_sequences",
    "us",
    "tokens_per_s",
    "percent_of_bound",
    "times bf16",
    "ok",
    "cost_percent",
    "times one rank",
    "compiled",
    "seconds",
)
LOG = "log.txt"  # of all stages
EXIT_S = 10  # seconds for a stage to exit after a signal
SPARE_S = 5  # seconds before the end of its time at which a stage stops by itself


def main() -> int:
    args = parse_arguments()
    if args.stage:
        run_stage(args.stage, args)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    write_context(args)
    (args.out / LOG).unlink(missing_ok=True)
    total = sum(STAGES[name] for name in args.stages)
    end = time.time() + 60 * args.minutes
    failed = []
    for i, name in enumerate(args.stages):
        # time that a stage does not use is divided among the remaining ones
        left = sum(STAGES[other] for other in args.stages[i:]) or total
        limit_s = (end - time.time()) * STAGES[name] / left
        has_ended = start_stage(name, args, limit_s)
        if not (show(args.out / f"{name}.json") and has_ended):
            failed.append(name)
    print(f"Results are in {args.out}" + (f"; stopped, failed or wrong: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES), metavar="NAME,NAME")
    parser.add_argument("--minutes", type=float, default=9.0)
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
    (args.out / f"{name}.json").unlink(missing_ok=True)
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
    sys.path[:0] = [str(HERE), str(ROOT / "src")]
    if args.dry_run:
        sys.path.append(str(ROOT / "tests"))
        importlib.import_module("triton_device")  # the interpreter, repaired
    from gpu.setup import Results, Setup

    setup = Setup(args.out, args.deadline, args.dry_run, args.vllm_site, args.ray_site)
    results = Results(args.out / f"{name}.json")
    for row in importlib.import_module(f"gpu.stage_{name}").run(setup):
        results.add(row)


def write_context(args: argparse.Namespace) -> None:
    """Write commit, command, GPU and versions into context.json: the other files hold only rows."""
    import torch

    sys.path.insert(0, str(HERE))
    import report

    found: dict[str, Any] = report.context("torch", "triton", "transformers", "safetensors")
    found["commit"] = found["commit"] or args.commit
    found["command"] = shlex.join(["python", *sys.argv])
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["card"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    (args.out / "context.json").write_text(json.dumps(found, indent=1) + "\n")


def show(path: Path) -> bool:
    """Print each row of a result in a few words. Returns whether no check failed."""
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
    return not wrong


if __name__ == "__main__":
    sys.exit(main())
