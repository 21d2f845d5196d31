"""`moray serve --set` accepts the same texts as `--set` of a job, and reports every mistake in our own words."""

from pathlib import Path
from typing import Any

import pytest

from moray.batch.spec import load_spec
from moray.engine.errors import UserError
from moray.jobs.commands.serve import read_args
from moray.serve.args import EndpointArgs


def serve(*overrides: str) -> EndpointArgs:
    return read_args("m", "auto", overrides)


def mistakes(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        serve(*overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_wating=5"], "max_wating: unknown key; did you mean 'max_waiting'?"),
        (["sampling.n=5"], "sampling: unknown key; known: model, name, device, "),
        (["max_waiting=-5"], "max_waiting: must be a whole number, 0 or more, is -5"),
        (["num_cpus=.nan"], "num_cpus: must be a number, 0 or more, is nan"),
        (["max_waiting"], "--set: must be key=value, such as max_waiting=64, is 'max_waiting'"),
        (["name=["], "--set name: '[' is not YAML: expected the node content, but found '<stream end>'"),
        (["name=a: b: c"], "--set name: 'a: b: c' is not YAML: mapping values are not allowed here"),
        (["name=" + "[" * 5000], "--set name: "),
        (["name=\0"], "--set name: "),
        (["name=5"], "name: must be text, is 5"),
        (["is_public=yes"], "is_public: must be true or false, is 'yes'"),
        (["max_tokens_cap=0"], "max_tokens_cap: must be null or a whole number, 1 or more, is 0"),
        (["max_tokens_cap=2.5"], "max_tokens_cap: must be null or a whole number, 1 or more, is 2.5"),
        (["request_timeout_s=soon"], "request_timeout_s: must be a number above 0, is 'soon'"),
        (
            ["kv_cache_memory=2 gigs"],
            "kv_cache_memory: must be auto, bytes or a size such as 2GiB, more than 0, is '2 gigs'",
        ),
        (["max_body_bytes=auto"], "max_body_bytes: must be bytes or a size such as 2GiB, more than 0, is 'auto'"),
        (["model={m}"], "model: must be text, is {'m': None}; for text write --set 'model=\"{m}\"'"),
        (["quantization=int2"], "quantization: must be null, int8, int4 or fp8, is 'int2'"),
        (["num_gpus=3"], "num_gpus: must be a number from 0 to 1, 2, 4 or 8, is 3"),
        (["num_gpus=.inf"], "num_gpus: must be a number from 0 to 1, 2, 4 or 8, is inf"),
        (["tensor_parallel=3"], "tensor_parallel: must be auto, 1, 2, 4 or 8, is 3"),
        (
            ["tensor_parallel=4", "num_gpus=2"],
            "num_gpus: is 2, but tensor_parallel is 4: each rank has a GPU of its own; set both to the same number",
        ),
        (["device=tpu"], "device: must be one of auto, cpu, cuda, is 'tpu'"),
        (
            ["max_waiting=x", "b"],
            "--set: must be key=value, such as max_waiting=64, is 'b'\nmax_waiting: must be",
        ),
    ],
)
def test_mistakes(overrides: list[str], message: str) -> None:
    assert mistakes(*overrides).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [([], 1), (["num_gpus=0.5"], 1), (["num_gpus=4"], 4), (["tensor_parallel=2"], 2), (["tensor_parallel=null"], 1)],
)
def test_a_replica_has_a_rank_for_each_gpu(overrides: list[str], ranks: int) -> None:
    args = serve(*overrides)
    assert args.num_ranks == args.engine_config(num_threads=1).tensor_parallel == ranks


KEYS = {
    "name": "name",
    "engine.max_num_seqs": "max_num_seqs",
    "engine.max_num_batched_tokens": "max_num_batched_tokens",
    "engine.kv_cache_memory": "kv_cache_memory",
    "engine.kv_cache_dtype": "kv_cache_dtype",
    "model.max_model_len": "max_model_len",
    "output.token_ids": "is_public",
}
TEXTS = (
    "no", "yes", "on", "true", "False", "007", "0x10", "1_000", "12", "12.0", "1e3", "-1", "0", "2GiB", "1.5 MB",
    "auto", "2024-01-01", "'5'", '"no"', "5 # five", "~", "", "[1]", "{a: 1}", "a: 1", "[", "!!python/name:os.system",
    "a#b", "é",
)  # fmt: skip


@pytest.mark.parametrize("in_job", KEYS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_means_the_same_in_a_job(tmp_path: Path, in_job: str, text: str) -> None:
    """Both accept a text and read the same value, or both refuse it. null means the endpoint's default."""
    job = tmp_path / "job.yaml"
    job.write_text("model: {path: m}\ninput: {path: i}\noutput: {path: o}\n")

    def of_job() -> Any:
        value: Any = load_spec(job, [f"{in_job}={text}"])
        for key in in_job.split("."):
            value = getattr(value, key)
        return value

    def of_serve() -> Any:
        return getattr(serve(f"{KEYS[in_job]}={text}"), KEYS[in_job])

    def outcome(read: Any) -> Any:
        try:
            return read()
        except UserError:
            return UserError

    found = outcome(of_serve)
    if found == getattr(serve(), KEYS[in_job]):
        assert outcome(of_job) in (found, UserError)
    else:
        assert found == outcome(of_job)


def test_arguments_of_a_serve_config_are_as_yaml_1_1_gives_them() -> None:
    """Ray Serve reads its config with PyYAML, where 1e3 is text."""
    args = EndpointArgs.model_validate({"model": "m", "request_timeout_s": "1e3", "kv_cache_memory": "2GiB"})
    assert (args.request_timeout_s, args.kv_cache_memory) == (1000.0, 2**31)
    assert EndpointArgs.model_validate({"model": "m", "num_threads": None}).num_threads == "auto"
