import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_jobs import TINY
from patience import PATIENCE_S
from typer.testing import CliRunner

from moray.batch.output.folder import OutputFolder
from moray.batch.output.job_folder import claim_folder
from moray.batch.plan.planner import plan_job
from moray.batch.spec import load_spec
from moray.engine.errors import UserError
from moray.jobs.cli import app, explain


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def job(checkpoints: dict[str, Path]) -> Path:
    Path("in").mkdir()
    Path("model").mkdir()
    for file in (*checkpoints["phimoe"].iterdir(), TINY / "tokenizer.json"):
        Path("model", file.name).symlink_to(file)
    pq.write_table(pa.table({"prompt": ["a"] * 40, "id": range(40)}), "in/1.parquet")
    pq.write_table(pa.table({"prompt": ["b"], "id": [1]}), "in/2.parquet")
    text = "name: small\nmodel: {path: model}\ninput: {path: in}\noutput: {path: out}\n"
    Path("job.yaml").write_text(text)
    return Path("job.yaml")


PLAIN = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
Done = subprocess.CompletedProcess[str]


def moray(*args: str, **variables: str) -> Done:
    """Run the command as a user would, 80 columns wide."""
    command = [sys.executable, "-m", "moray.jobs.cli", *args]
    environment = os.environ | PLAIN | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=False)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs `moray plan job.yaml` in this process, which has imported what a new one would take seconds to import."""

    def run(*options: str) -> Done:
        with monkeypatch.context() as patched:
            for name, value in PLAIN.items():
                patched.setenv(name, value)
            result = CliRunner().invoke(app, ["plan", "job.yaml", *options])
        if not isinstance(result.exception, UserError):
            return Done([], result.exit_code, result.stdout, result.stderr)
        return Done([], 2, result.stdout, f"{explain(result.exception)}\n")

    return run


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def test_version_of_the_installed_command() -> None:
    command = Path(sys.executable).with_name("moray")
    result = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == "moray 0.1.0\n"


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_command_that_is_started_without_output(job: Path, closed: str) -> None:
    """Some daemons start commands so. A job without rows needs no Ray, but has a driver."""
    for path in Path("in").iterdir():
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    shell = f'exec "$0" -m moray.jobs.cli run job.yaml {closed}'
    done = subprocess.run(["bash", "-c", shell, sys.executable], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "") and len(list(Path("out").glob("part-*"))) == 1


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from typer.testing import CliRunner
from moray.jobs.cli import app
print(CliRunner().invoke(app, ["--help"]).exit_code)
print([m for m in ("torch", "ray", "pyarrow", "pydantic", "transformers") if m in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "0\n[]\n"


def test_every_mistake_of_a_spec() -> None:
    Path("job.yaml").write_text(
        "model: {path: m, dtype: int8}\ninput: {path: i}\noutput: {}\nsampling: {temprature: 1, top_p: 2}\n"
    )
    for command in ("run", "plan"):
        result = moray(command, "job.yaml", "--set", "task=scroe", "--set", "engine.max_seqs=4")
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == (
            "The job spec is wrong:\n"
            "  task: must be one of generate, score, classify, is 'scroe'\n"
            "  model.dtype: must be one of auto, float32, float16, bfloat16, is 'int8'\n"
            "  sampling.top_p: must be a number, between 0.0 and 1.0, is 2\n"
            "  sampling.temprature: unknown key; did you mean 'temperature'?\n"
            "  output.path: is required\n"
            "  engine.max_seqs: unknown key; did you mean 'max_num_seqs'?\n"
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("input.path=gone", "The input cannot be used:\n  gone: no such file or folder\n"),
        (
            "input.prompt=question",
            "The input cannot be used:\n"
            "  1.parquet: has no column 'question' (input.prompt); known: prompt, id\n"
            "  2.parquet: has no column 'question' (input.prompt); known: prompt, id\n",
        ),
        (
            "model.path=in",
            "The model cannot be used:\n  in holds no checkpoint: no config.json, only 1.parquet, 2.parquet.\n",
        ),
        (
            "output.path=in/out",
            "The job spec is wrong:\n  output.path: is inside the input folder {cwd}/in; "
            "write to a folder outside it\n",
        ),
        (
            "output.path=ftp://x/y",
            "That cannot be done:\n  ftp://x/y: must be a local path or start with s3://, gs://, file://\n",
        ),
    ],
)
def test_what_does_not_fit(job: Path, plan: Callable[..., Done], override: str, message: str) -> None:
    result = plan("--set", override)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == message.format(cwd=Path.cwd())


def test_a_missing_spec() -> None:
    result = moray("run", "no.yaml")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "The job spec is wrong:\n  no.yaml: cannot be read: No such file or directory\n"


def test_usage() -> None:
    assert moray("run").returncode == 2
    assert moray("fly").returncode == 2
    assert moray("run", "job.yaml", "--fly").returncode == 2


def test_a_folder_of_another_job(job: Path) -> None:
    planned = plan_job(load_spec(job, ["sampling.temperature=0.5"]))
    folder = OutputFolder("out")
    claim_folder(folder, planned.spec, planned.plan)
    folder.write(planned.plan.part_name(planned.plan.shards[0]), b"a part")
    pq.write_table(pa.table({"prompt": ["c"]}), "in/3.parquet")
    Path("in/2.parquet").unlink()
    for command in ("run", "plan"):
        result = moray(command, str(job), "--set", "output.keep=[prompt]")
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == (
            "The output folder cannot be used:\n"
            "  out holds the output of another job. Give this one a folder of its own, or undo what changed:\n"
            '    output.keep: all -> ["prompt"]\n'
            "    sampling.temperature: 0.5 -> 0.0\n"
            "    input file 2.parquet: missing now\n"
            "    new input file 3.parquet\n"
        )


def test_an_environment_with_hugging_face_kernels(job: Path) -> None:
    Path("site/kernels-0.17.2.dist-info").mkdir(parents=True)
    Path("site/kernels-0.17.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    Path("site/kernels.py").write_text("raise AssertionError")
    result = moray("plan", str(job), PYTHONPATH="site")
    assert (result.returncode, result.stderr) == (0, "")


def test_plan(job: Path, plan: Callable[..., Done]) -> None:
    changes = ("sampling.n=2", "model.max_model_len=200", "engine.kv_cache_memory=1MiB")
    result = plan(*(word for change in changes for word in ("--set", change)))
    assert (result.returncode, result.stderr) == (0, "")
    digits = re.findall("part-(........)-", result.stdout)[0]
    num_bytes = sum(path.stat().st_size for path in Path("in").iterdir())
    memory = re.findall(r"this machine, (.*):", result.stdout)[0]  # what is free on it
    assert lines(result.stdout) == [
        "small",
        f"Input    in: 41 rows in 2 files, {num_bytes / 1000:.3g} kB",
        "         reads prompt, id; keeps prompt, id",
        "Model    model: phimoe, 195 k parameters, 2 of 8 experts a token, 779 kB as",
        "         float32",
        "         512 B of KV cache a token, context 200",
        "Work     3 shards of 16 rows, at most 5,248 tokens to generate",
        "Prompts  41 tokens in all rows that run",
        "         1.0 tokens a prompt, half have at most 1, 95% at most 1, the longest 1",
        "         1 ██████████████████████████████ 41",
        "         39 rows with the prompt of an earlier row",
        "Errors   none before the engine",
        f"Memory   this machine, {memory}: 779 kB of weights, 1.05 MB of KV cache, 2,048",
        "         tokens",
        "         at once 25 sequences of 65 tokens (the mean), 25 of 65 (the longest), 9",
        "         of 200 (the context), all at full length",
        "         a step has at most 64 sequences and 512 tokens",
        "Time     not known: nothing similar was measured; give --tokens-per-second",
        f"Output   out/part-{digits}-*.parquet",
        "         prompt string, id int64, sample int32, generated_text string,",
        "         finish_reason string, num_prompt_tokens int32, num_generated_tokens",
        "         int32, error struct<stage: string, code: string, message: string>,",
        "         source_file string, source_row int64",
        "Done     nothing yet",
    ]
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["Latin-1", "ASCII"],
)
def test_a_terminal_that_lacks_characters(job: Path, variables: dict[str, str]) -> None:
    name = "Résumés 履歴書"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "id": pa.array([], pa.int64())}), "in/1.parquet")
    Path("in/2.parquet").unlink()
    job.write_text(job.read_text().replace("small", name), encoding="utf-8")
    shown = name.encode("latin-1" if len(variables) == 1 else "ascii", "backslashreplace")
    for command in ("plan", "run"):  # without rows, so that no Ray is needed
        result = subprocess.run(
            [sys.executable, "-m", "moray.jobs.cli", command, "job.yaml"],
            capture_output=True, env=os.environ | {"COLUMNS": "120"} | variables, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert (result.returncode, result.stderr) == (0, b""), result.stderr.decode(errors="replace")
        assert shown in result.stdout, result.stdout.decode(errors="replace")


def test_plan_of_a_job_that_scores(job: Path, plan: Callable[..., Done]) -> None:
    score = ("task=score", "input.continuation=prompt", "output.logprobs=0", "output.keep=none")
    result = plan(*(word for override in score for word in ("--set", override)))
    assert (result.returncode, result.stderr) == (0, "")
    shown = lines(result.stdout)
    assert shown[6:8] == [
        "Work     3 shards of 16 rows, continuations in prompt to score",
        "Prompts  82 tokens in all rows that run",
    ]
    assert shown[-7:-2] == [
        f"Output   out/part-{re.findall('part-(........)-', result.stdout)[0]}-*.parquet",
        "         sample int32, logprob double, num_prompt_tokens int32,",
        "         num_continuation_tokens int32, is_greedy bool, token_logprobs",
        "         list<item: struct<token_id: int32, logprob: float, top: list<item:",
        "         struct<token_id: int32, logprob: float>>>>, error struct<stage: string,",
    ]


def test_gpus_side_by_side_or_one_that_is_too_small(job: Path, plan: Callable[..., Done]) -> None:
    result = plan("--gpu", "L4", "--gpu", "H100")
    assert (result.returncode, result.stderr) == (0, "")
    shown = lines(result.stdout)
    first = shown.index("         GPU         Memory  KV cache   Tokens  At once  Fits")
    assert shown[first + 2 : first + 5] == [
        "         L4        22.5 GiB   0.1 GiB  262,144     1024  yes",
        "         H100      79.6 GiB   0.1 GiB  262,144     1024  yes",
        "         H100 NVL  93.6 GiB   0.1 GiB  262,144     1024  yes",
    ]
    result = plan("--gpu", "L4", "--gpus", "2", "--gpus", "4")
    assert (result.returncode, result.stderr) == (0, "")
    shown = lines(result.stdout)
    first = shown.index("         GPU       Memory  Weights  KV cache   Tokens  At once  Fits")
    assert shown[first - 1] == "Memory   of each GPU; at once: sequences of mean and of longest length"
    assert shown[first + 2 : first + 4] == [
        "         2 x L4  22.5 GiB   413 kB   67.1 MB  262,144     1024  yes",
        "         4 x L4  22.5 GiB   239 kB   67.1 MB  262,144     1024  yes",
    ]
    result = plan("--gpu", "L4", "--set", "engine.kv_cache_memory=30GiB")
    assert (result.returncode, result.stdout) == (2, "")
    assert "  --gpu L4: 0.0 GiB of weights and about 1.3 GiB of working memory leave 21.2 of 22.5 GiB" in result.stderr


def test_gpus_that_no_kernel_runs_on(job: Path, plan: Callable[..., Done]) -> None:
    result = plan("--gpu", "T4", "--set", "model.dtype=bfloat16")
    assert (result.returncode, result.stdout) == (2, "")
    assert "  --gpu T4: no kernel runs on it: it has compute capability 7.5; bfloat16 needs 8.0" in result.stderr
    result = plan("--gpu", "all")
    assert (result.returncode, result.stderr) == (0, "")
    shown = {line.split()[0]: line.split()[-2:] for line in lines(result.stdout) if " GiB " in line}
    assert shown["V100"] == shown["P100"] == shown["K80"] == ["no", "kernel"]
    assert shown["T4"][-1] == shown["RTX-PRO-6000"][-1] == "yes", "the model is in fp32"


def test_plan_as_json(job: Path, plan: Callable[..., Done]) -> None:
    options = ("--gpu", "L4", "--tokens-per-second", "100", "--price", "1.5")
    result = plan("--json", "--set", "output.keep=[id]", *options)
    assert (result.returncode, result.stderr) == (0, "")
    plan = json.loads(result.stdout)
    assert plan == {
        "name": "small",
        "task": "generate",
        "choices": [],
        "input": {
            "path": "in",
            "files": 2,
            "bytes": sum(path.stat().st_size for path in Path("in").iterdir()),
            "rows": 41,
            "read_columns": ["id", "prompt"],
            "kept_columns": ["id"],
            "continuation": None,
        },
        "model": {
            "path": "model",
            "architecture": "phimoe",
            "num_parameters": 194720,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "dtype": "float32",
            "weights_bytes": 778880,
            "cache_token_bytes": 512,
            "max_position_embeddings": 256,
            "quantization": None,
            "kv_cache": None,
            "quantized_weights_bytes": {"int8": 274560, "int4": 200320, "fp8": 274560},
            "rank_weights_bytes": {"1": 778880, "2": 413248, "4": 238752},
            "quantized_rank_weights_bytes": plan["model"]["quantized_rank_weights_bytes"],
        },
        "max_model_len": 256,
        "shards": 3,
        "shard_rows": 16,
        "max_generated_tokens": 41 * 64,
        "rows_set_max_tokens": False,
        "warnings": [],
        "output": {
            "path": "out",
            "parts": f"part-{plan['fingerprint'][:8]}-*.parquet",
            "columns": {
                "id": "int64",
                "sample": "int32",
                "generated_text": "string",
                "finish_reason": "string",
                "num_prompt_tokens": "int32",
                "num_generated_tokens": "int32",
                "error": "struct<stage: string, code: string, message: string>",
                "source_file": "string",
                "source_row": "int64",
            },
        },
        "sample": {
            "rows": 41,
            "is_whole": True,
            "reach": 1.0,
            "prompt_tokens": {"mean": 1.0, "median": 1, "p95": 1, "longest": 1},
            "histogram": [{"first": 1, "last": 1, "rows": 41}],
            "errors": {},
            "null_rows": 0,
            "too_long_rows": 0,
            "duplicate_rows": 39,
            "shared_prefix_tokens": 0,
        },
        "forecast": {
            "rows": 41,
            "prompt_tokens": {"expected": 41, "low": 41, "high": 41},
            "generated_tokens": {"expected": None, "low": 0, "high": 2624},
            "error_rows": {},
            "tokens_per_s": 100.0,
            "source": "100 tokens/s a worker, as given",
            "seconds": None,
            "card_hours": None,
            "price": None,
            "warnings": [],
            "workers": 1,
            "gpus": 1.0,
            "at_most": {"seconds": 26.2, "card_hours": 0.0073, "price": 0.0109},
        },
        "memory": [
            {
                "name": "L4",
                "gpus": 1,
                "memory_bytes": 23034 << 20,
                "weights_bytes": 778880,
                "working_bytes": plan["memory"][0]["working_bytes"],
                "cache_bytes": 4 * 65536 * 512,
                "cache_tokens": 4 * 65536,
                "max_num_seqs": 1024,
                "max_num_batched_tokens": 4096,
                "sequences": {
                    "mean_tokens": 65,
                    "of_mean": 1024,
                    "longest_tokens": 65,
                    "of_longest": 1024,
                    "context_tokens": 256,
                    "of_context": 1024,
                },
                "runs": True,
                "fits": True,
                "why_not": None,
            }
        ],
        "fingerprint": plan["fingerprint"],
        "committed": {"shards": 0, "rows": 0, "failed_rows": 0},
    }


def test_what_a_worker_could_not_load_is_refused_before_it_starts(job: Path, plan: Callable[..., Done]) -> None:
    too_long = "--set", "model.max_model_len=257"
    for result in (moray("run", "job.yaml", *too_long), plan(*too_long)):
        assert (result.returncode, lines(result.stderr)[1:]) == (
            2,
            ["  model.max_model_len: must be at most the model's context (max_position_embeddings), 256, is 257"],
        )
    result = plan("--set", "sampling.max_tokens=256")
    assert (result.returncode, lines(result.stderr)[1:]) == (
        2,
        [
            "  sampling.max_tokens: needs 257 tokens (prompt 1 + max_tokens 256); this model holds 256. "
            "Shorten it or raise model.max_model_len."
        ],
    )
    Path("model/tokenizer.json").unlink()
    result = plan()
    assert result.returncode == 2 and "no tokenizer; one of tokenizer.json" in result.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_job_runs(number: signal.Signals, code: int) -> None:
    os.mkfifo("job.yaml")
    process = subprocess.Popen([sys.executable, "-m", "moray.jobs.cli", "run", "job.yaml"], stderr=subprocess.PIPE)
    writer = None  # it writes nothing, so that reading waits
    while writer is None:
        assert process.poll() is None
        time.sleep(0.05)
        with contextlib.suppress(OSError):  # there is no reader yet
            writer = os.open("job.yaml", os.O_WRONLY | os.O_NONBLOCK)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    os.close(writer)
    assert (process.returncode, stderr) == (code, b"")
