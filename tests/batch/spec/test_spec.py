import subprocess
import sys
from pathlib import Path

import pytest

from moray.batch.spec import JobSpec, load_spec
from moray.engine.config import EngineConfig
from moray.engine.errors import RequestError, SpecError
from moray.engine.params import SamplingParams
from moray.engine.sampling.scoring import scoring_params
from moray.engine.settings.yaml_text import parse_yaml

SMALLEST = "model: {path: m}\ninput: {path: i}\noutput: {path: o}\n"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return tmp_path / "job.yaml"


def load(job: Path, text: str, *overrides: str) -> JobSpec:
    job.write_text(text)
    return load_spec(job, overrides)


def mistakes(job: Path, text: str, *overrides: str) -> str:
    with pytest.raises(SpecError) as error:
        load(job, text, *overrides)
    return str(error.value).replace(str(job), "job.yaml")


def test_defaults(job: Path) -> None:
    spec = load(job, SMALLEST)
    assert spec.model_dump() == {
        "name": "job",
        "task": "generate",
        "model": {"path": "m", "dtype": "auto", "quantization": None, "max_model_len": None, "longrope": "dynamic"},
        "input": {
            "path": "i",
            "format": "auto",
            "hive": "auto",
            "where": None,
            "sample": None,
            "sample_seed": 0,
            "limit": None,
            "prompt": "prompt",
            "messages": None,
            "token_ids": None,
            "messages_format": "auto",
            "continuation": None,
        },
        "template": {
            "system": None,
            "chat": "auto",
            "prompt": None,
            "date": "today",
            "bos": "auto",
            "special_tokens": "allow",
            "variables": {},
            "columns": {},
        },
        "sampling": {
            "max_tokens": 64,
            "min_tokens": 0,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": {},
            "stop": (),
            "stop_token_ids": (),
            "ignore_eos": False,
            "seed": 0,
            "n": 1,
            "structured": None,
            "columns": {},
        },
        "output": {
            "path": "o",
            "keep": "all",
            "token_ids": False,
            "special_tokens": "drop",
            "reasoning": None,
            "parse": False,
            "logprobs": None,
        },
        "engine": {
            "max_num_seqs": "auto",
            "max_num_batched_tokens": "auto",
            "kv_cache_memory": "auto",
            "kv_cache_dtype": "auto",
            "tensor_parallel": "auto",
            "expert_parallel": False,
            "dedup": "auto",
        },
        "workers": {
            "min": 1,
            "max": "auto",
            "gpus": "auto",
            "cpus": "auto",
            "accelerator": None,
            "labels": {},
            "io_labels": {},
            "start_timeout_s": 3600.0,
        },
        "limits": {"max_failed_rows": None, "row_timeout_s": None, "job_timeout_s": None, "restarts": 3},
    }
    assert spec.sampling_params() == SamplingParams()
    assert spec.engine_config() == EngineConfig(is_bulk=True)


def test_every_mistake_at_once(job: Path) -> None:
    text = """\
name: ''
task: scroe
modle: {path: x}
temperature: 0.7
model: {dtype: int8, quantization: int2, longrope: yes, max_model_len: 0}
input: {path: [], prompt: p, messages: m, promt: 3}
template: 3
sampling:
  max_tokens: 0
  temperature: warm
  top_p: 1.4
  temprature: 3
  stop: x
  logit_bias: {5: 400}
  columns: {temprature: t}
output: {path: o, keep: [id, id], logprobs: 50, token_ids: maybe}
engine: {kv_cache_memory: 2 gigs, kv_cache_dtype: int8, max_num_seqs: none, zzz: 1}
workers: {min: 4, max: 2}
limits: {row_timeout_s: 0, restarts: -1}
"""
    assert (
        mistakes(job, text, "sampling.n=0", "sampling.seed=[", "a", "name.x=3")
        == """\
--set sampling.seed: '[' is not YAML: expected the node content, but found '<stream end>' (while parsing a flow node)
--set: must be key=value, such as sampling.temperature=0.7, is 'a'
--set name.x: name is '', not a section
name: must be text, is ''
task: must be one of generate, score, classify, is 'scroe'
model.path: is required
model.dtype: must be one of auto, float32, float16, bfloat16, is 'int8'
model.quantization: must be null, int8, int4 or fp8, is 'int2'
model.max_model_len: must be null or a whole number, 1 or more, is 0
model.longrope: must be one of dynamic, static, is 'yes'
input.path: must be a path or a list of paths, is []
input.messages: only one of prompt, messages, token_ids may name a column; set input.prompt to null
input.promt: unknown key; did you mean 'prompt'?
template: must be a section with keys (system, chat, prompt, date, bos, special_tokens, variables, columns), is 3
sampling.max_tokens: must be a whole number, 1 or more, is 0
sampling.temperature: must be a number, is 'warm'
sampling.top_p: must be a number, between 0.0 and 1.0, is 1.4
sampling.logit_bias: bias of token 5 must be between -100 and 100, is 400
sampling.stop: must be a list of strings that are not empty, is 'x'
sampling.n: must be a whole number, between 1 and 128, is 0
sampling.columns: unknown field 'temprature'; did you mean 'temperature'?
sampling.temprature: unknown key; did you mean 'temperature'?
output.keep: must be all, none or a list of different columns, is ['id', 'id']
output.token_ids: must be true or false, is 'maybe'
output.logprobs: must be a whole number, between 0 and 20, is 50
engine.max_num_seqs: must be auto or a whole number, 1 or more, is 'none'
engine.kv_cache_memory: must be auto, bytes or a size such as 2GiB, more than 0, is '2 gigs'
engine.kv_cache_dtype: must be auto, model or fp8, is 'int8'
engine.zzz: unknown key; known: max_num_seqs, max_num_batched_tokens, kv_cache_memory, kv_cache_dtype, \
tensor_parallel, expert_parallel, dedup
workers.max: must be at least workers.min (4), is 2
limits.row_timeout_s: must be null or a number above 0, is 0
limits.restarts: must be a whole number, 0 or more, is -1
modle: unknown key; did you mean 'model'?
temperature: unknown key; did you mean 'sampling.temperature'?"""
    )


def test_an_empty_spec_asks_for_what_has_no_default(job: Path) -> None:
    assert mistakes(job, "limits:\n") == "model.path: is required\ninput.path: is required\noutput.path: is required"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "job.yaml:2: key 'name' appears twice"),
        ("model: {path: a,\n  path: b}\n", "job.yaml:2: key 'path' appears twice"),
        ("name: [a\ntask: b\n", "job.yaml:2: expected ',' or ']', but got ':' (while parsing a flow sequence)"),
        ("a: !!python/object/apply:os.system [x]\n", "job.yaml:1: could not determine a constructor for the tag"),
        ("- a\n", "job.yaml: must be a mapping with keys (model, input, ...), is ['a']"),
        ("", "job.yaml: must be a mapping with keys (model, input, ...), is null"),
    ],
)
def test_text_that_is_not_a_spec(job: Path, text: str, message: str) -> None:
    assert mistakes(job, text).startswith(message)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no\.yaml: cannot be read: No such file or directory$"):
        load_spec(tmp_path / "no.yaml")
    with pytest.raises(SpecError, match=r"cannot be read: Is a directory$"):
        load_spec(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(SpecError, match=r"latin\.yaml: is not UTF-8 text$"):
        load_spec(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("given", "num_rows", "want"),
    [
        ("null", 1000, None),
        ("7", 1000, 7),
        ("0", 1000, 0),
        ("0.5%", 1000, 5),
        ("0.5%", 999, 4),
        ("0.29%", 10_000, 29),  # 28.999999999999996 in floating point
        ("100 %", 3, 3),
        ("0%", 50, 0),
    ],
)
def test_how_many_rows_may_fail(job: Path, given: str, num_rows: int, want: int | None) -> None:
    assert load(job, SMALLEST, f"limits.max_failed_rows={given}").limits.max_failed(num_rows) == want


@pytest.mark.parametrize("given", ["-1", "1.5", "101%", "-1%", "many", "true"])
def test_what_is_no_share_of_rows(job: Path, given: str) -> None:
    with pytest.raises(SpecError, match=r"limits.max_failed_rows: must be null, a whole number, .* such as 0.5%, is"):
        load(job, SMALLEST, f"limits.max_failed_rows={given}")


def test_overrides(job: Path) -> None:
    spec = load(
        job,
        SMALLEST + "sampling: {stop: [a], top_k: 5}\nlimits:\n",
        "sampling.temperature=1e-1",
        "sampling.stop=[b, 'no']",
        "sampling.columns.max_tokens=budget",
        "limits.max_failed_rows=3",
        "name=a=b",
        "input={path: x, messages: chat}",
        "output.keep=[id]",
        "engine.kv_cache_memory=1.5GiB",
        "output.logprobs=2",
    )
    assert spec.sampling.temperature == 0.1
    assert spec.sampling.stop == ("b", "no")
    assert spec.sampling.top_k == 5
    assert spec.sampling.columns == {"max_tokens": "budget"}
    assert spec.limits.max_failed_rows == 3
    assert spec.name == "a=b"
    assert (spec.input.path, spec.input.kind, spec.input.column) == ("x", "messages", "chat")
    assert spec.output.keep == ("id",)
    assert spec.engine_config().kv_cache_memory == 3 * 2**29
    assert spec.sampling_params().logprobs == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.min_tokens=65", "sampling.min_tokens: must be at most max_tokens (64), is 65"),
        ("sampling.temperature=", "sampling.temperature: must be a number, is null"),
        ("sampling.temperature=.nan", "sampling.temperature: must be a number, between 0.0 and 10.0, is nan"),
        ("sampling.max_tokens=64.0", "sampling.max_tokens: must be a whole number, is 64.0"),
        ("sampling.ignore_eos=1", "sampling.ignore_eos: must be true or false, is 1"),
        ("sampling.columns=3", "sampling.columns: must map sampling fields to input columns, is 3"),
        ("sampling.columns={logprobs: x}", "sampling.columns: unknown field 'logprobs'; known: max_tokens, "),
        ("task=rank", "task: must be one of generate, score, classify, is 'rank'"),
        ("template.system=hi", "template: system is for messages, but input names prompt"),
        (
            "template.prompt=Translate: {prompt}",
            "template.prompt: must be text or null, is {'Translate': {'prompt': None}}; for text write "
            "--set 'template.prompt=\"Translate: {prompt}\"'",
        ),
        (
            "template.prompt={prompt}",
            "template.prompt: must be text or null, is {'prompt': None}; for text write "
            "--set 'template.prompt=\"{prompt}\"'",
        ),
        ("template.date=2026-11-29", "template: date is for messages, but input names prompt"),
        ("template.date=29.11.2026", "template.date: must be today or a date such as 2026-11-29, is '29.11.2026'"),
        ("template.bos=no", "template.bos: must be one of auto, never, is 'no'"),
        (
            "template.variables={bos_token: x}",
            "template.variables: 'bos_token' is given to every chat template and can",
        ),
        ("template.columns={messages: x}", "template.columns: 'messages' is given to every chat template and cannot"),
        ("template.columns={a: 1}", "template.columns: must be a map from names to input columns, is {'a': 1}"),
        ("template.variables={a: .inf}", "template.variables: must be a map from names to text, numbers, true, false,"),
        ("template.special_tokens=no", "template.special_tokens: must be one of allow, escape, is 'no'"),
        (
            "template.chat='{{ foo('",
            "template.chat: must be auto or a Jinja template, is '{{ foo(': line 1: unexpected 'end of template'",
        ),
        ("template.prompt=hi", "template.prompt: names no column; write {name} where a column's text belongs"),
        ("template.prompt='{}'", "template.prompt: has {} without a column name; write {{}} for braces"),
        ("template.prompt='{a.b}'", "template.prompt: column 'a.b' must be a plain name"),
        ("template.prompt='{a:>3}'", "template.prompt: column 'a' must stand alone in its braces"),
        ("template.prompt='{a'", "template.prompt: expected '}' before end of string"),
        ("workers.gpus=-1", "workers.gpus: must be auto, a number from 0 to 1, 2, 4 or 8, is -1"),
        ("workers.gpus=true", "workers.gpus: must be auto, a number from 0 to 1, 2, 4 or 8, is true"),
        ("workers.gpus=3", "workers.gpus: must be auto, a number from 0 to 1, 2, 4 or 8, is 3"),
        ("workers.gpus=1.5", "workers.gpus: must be auto, a number from 0 to 1, 2, 4 or 8, is 1.5"),
        (
            "workers.gpus=0.5",
            "workers: gpus is 0.5, but the first worker on a GPU would use all of its memory; "
            "set engine.kv_cache_memory",
        ),
        ("workers.accelerator=3", "workers.accelerator: must be null or a type of GPU, is 3"),
        ("workers.labels=[a]", "workers.labels: must be a map from node labels to text, is ['a']"),
        ("workers.io_labels={a: 1}", "workers.io_labels: must be a map from node labels to text, is {'a': 1}"),
        ("workers.start_timeout_s=0", "workers.start_timeout_s: must be null or a number above 0, is 0"),
        ("workers.cpus=0", "workers.cpus: must be auto or a number above 0, is 0"),
        ("engine.tensor_parallel=3", "engine.tensor_parallel: must be auto, 1, 2, 4 or 8"),
        ("engine.kv_cache_memory=0", "engine.kv_cache_memory: must be auto, bytes or a size such as 2GiB"),
        ("output.reasoning=thinks", "output.reasoning: must be null, think, harmony or a map with the texts start and"),
        ("output.reasoning={start: a}", "output.reasoning: must be null, think, harmony or a map with the texts start"),
        ("output.keep=alll", "output.keep: must be all, none or a list of different columns, is 'alll'"),
        ("model.path=null", "model.path: must be text, is null"),
        ("a..b=1", "--set: must be key=value, such as sampling.temperature=0.7, is 'a..b=1'"),
    ],
)
def test_one_mistake(job: Path, override: str, message: str) -> None:
    assert mistakes(job, SMALLEST, override).startswith(message)


@pytest.mark.parametrize(
    ("gpus", "ranks", "on_gpus", "without", "split"),
    [
        ("auto", "auto", 1, 0, None),
        ("auto", 2, 2, 0, 2),
        (0, 4, 0, 0, 4),
        (0.5, "auto", 0.5, 0.5, None),
        (0.5, 1, 0.5, 0.5, 1),
        (1, "auto", 1, 1, None),
        (4, "auto", 4, 4, 4),
        (8, 8, 8, 8, 8),
    ],
)
def test_each_rank_has_a_gpu(
    job: Path, gpus: object, ranks: object, on_gpus: float, without: float, split: int | None
) -> None:
    overrides = [f"workers.gpus={gpus}", f"engine.tensor_parallel={ranks}", "engine.kv_cache_memory=1GiB"]
    spec = load(job, SMALLEST, *overrides)
    assert (spec.gpus_per_worker(has_gpus=True), spec.gpus_per_worker(has_gpus=False)) == (on_gpus, without)
    assert spec.engine_config().tensor_parallel == split


@pytest.mark.parametrize(("gpus", "ranks"), [("2", 4), ("2", 1), ("1", 2), ("0.5", 2)])
def test_gpus_that_are_not_as_many_as_the_ranks(job: Path, gpus: str, ranks: int) -> None:
    message = mistakes(job, SMALLEST, f"workers.gpus={gpus}", f"engine.tensor_parallel={ranks}")
    assert message == (
        f"workers: gpus is {gpus}, but engine.tensor_parallel is {ranks}: each rank has a GPU of its own; set both to "
        "the same number"
    )


SCORE = SMALLEST.replace("{path: i}", "{path: i, continuation: choices}") + "task: score\n"


def test_a_spec_that_scores(job: Path) -> None:
    spec = load(job, SCORE, "output.logprobs=3", "input.messages=chat")
    assert (spec.input.kind, spec.input.continuation) == ("messages", "choices")
    assert spec.sampling_params() == scoring_params(3)
    assert "sampling" not in parse_yaml(spec.to_yaml())
    assert load(job, spec.to_yaml()) == spec


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (SMALLEST, ["task=score"], "input: task score needs continuation, the column of what is scored"),
        (SCORE, ["task=generate"], "input: continuation is for task score; task generate takes none"),
        (SCORE, ["sampling.seed=0", "sampling.max_tokens=1"],
         "sampling: task score samples nothing; drop max_tokens, seed"),
        (SCORE, ["sampling.columns={}"], "sampling: task score samples nothing; drop columns"),
        (SCORE, ["output.token_ids=true"],
         "output: token_ids is for task generate; logprobs writes the token ids of what is scored"),
        (SCORE, ["input.continuation=[a, b]"], "input.continuation: must be the name of a column, is ['a', 'b']"),
        (SCORE, ["output.logprobs=21"], "output.logprobs: must be a whole number, between 0 and 20, is 21"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_task(job: Path, text: str, overrides: list[str], message: str) -> None:
    assert mistakes(job, text, *overrides) == message


def test_a_key_that_is_not_text(job: Path) -> None:
    assert mistakes(job, SMALLEST + "5: x\n").startswith("5: unknown key; known: name, task, ")


def test_round_trip(job: Path) -> None:
    text = """\
name: 1e3
model: {path: hf://a/b, max_model_len: 100}
input: {path: [a, b], token_ids: ids}
sampling: {temperature: 1e-5, logit_bias: {5: 1, 7: -2.5}, stop: ['1e3', 'no', ' ', "a\\nb", 'é'], columns: {seed: s}}
output: {path: o, keep: ['null', 'on', '2024-01-01']}
engine: {kv_cache_memory: 2GB}
workers: {cpus: 0.5}
"""
    spec = load(job, text.replace("name: 1e3", "name: '1e3'"))
    assert load(job, spec.to_yaml()) == spec
    assert spec.engine.kv_cache_memory == 2 * 10**9


@pytest.mark.parametrize("value", ["auto", "true", "on"])
def test_a_key_that_is_gone_is_dropped_with_one_sentence(
    job: Path, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    spec = load(job, SMALLEST + f"engine: {{deterministic: {value}, max_num_seqs: 3}}\n")
    assert spec == load(job, SMALLEST + "engine: {max_num_seqs: 3}\n")
    assert "deterministic" not in spec.to_yaml()
    assert [record.getMessage() for record in caplog.records] == [
        "engine.deterministic: results are always deterministic, and the key is gone; remove it"
    ]


def test_values_of_a_row(job: Path) -> None:
    columns = "{max_tokens: m, temperature: t, stop: s, logit_bias: b}"
    spec = load(job, SMALLEST + f"sampling: {{max_tokens: 8, temperature: 0.5, columns: {columns}}}\n")
    row = {"max_tokens": 3.0, "temperature": None, "stop": ["x"], "logit_bias": [(5, 1.0)]}
    expected = SamplingParams(max_tokens=3, temperature=0.5, stop=("x",), logit_bias={5: 1.0})
    assert spec.sampling_params(row) == expected
    for wrong, message in ((3.5, r"must be a whole number, is 3\.5"), (0.0, "must be a whole number, 1 or more, is 0")):
        with pytest.raises(RequestError, match=f"^max_tokens: {message}$"):
            spec.sampling_params({"max_tokens": wrong})


def test_importing_the_spec_loads_nothing_heavy() -> None:
    heavy = ("torch", "ray", "pyarrow", "transformers")
    code = f"import sys, moray.batch.spec, moray.batch.shards; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
