from typing import Any

import pytest

from moray.batch.fingerprint import Fingerprint, compute_fingerprint
from moray.batch.spec import JobSpec

FILES = {"a.parquet": "10 bytes, footer aa", "b.parquet": "20 bytes, footer bb"}
MODEL = {"weights": "w1", "config": "c1"}


def spec(**sections: Any) -> JobSpec:
    required = {"model": {"path": "m"}, "input": {"path": "i"}, "output": {"path": "o"}}
    merged = {name: required.get(name, {}) | value for name, value in sections.items() if isinstance(value, dict)}
    return JobSpec.model_validate(required | sections | merged)


def make_fingerprint(**sections: Any) -> Fingerprint:
    return compute_fingerprint(spec(**sections), FILES, MODEL)


def test_the_digest_is_pinned() -> None:
    """Parts of finished jobs hold it: after a change, every job of an earlier version would refuse its folder."""
    assert make_fingerprint().hexdigest == "1248f1691261ad47a6f490c5667a208d7389a63c2642802aadc7b8b432f5daf7"
    assert make_fingerprint().short == make_fingerprint().hexdigest[:8]


def test_a_spec_that_was_frozen_with_a_key_that_is_gone_has_the_same_digest() -> None:
    key = "  kv_cache_memory: auto\n"
    frozen = spec().to_yaml().replace(key, f"{key}  deterministic: auto\n")
    assert "deterministic" in frozen
    assert compute_fingerprint(JobSpec.from_yaml(frozen), FILES, MODEL) == make_fingerprint()


@pytest.mark.parametrize(
    "sections",
    [
        {"name": "other"},
        {"output": {"path": "elsewhere"}},
        {"model": {"path": "a copy"}},
        {"input": {"path": "a copy"}},
        {"workers": {"max": 3, "gpus": 1}},
        {"limits": {"job_timeout_s": 5, "restarts": 0}},
        {"engine": {"deterministic": "auto"}},
        {"engine": {"tensor_parallel": 4}},
        {"workers": {"gpus": 2}, "engine": {"tensor_parallel": 2}},
        {"engine": {"max_num_seqs": 3, "kv_cache_memory": "2GiB", "max_num_batched_tokens": 5}},
    ],
)
def test_what_it_does_not_depend_on(sections: dict[str, Any]) -> None:
    assert make_fingerprint(**sections) == make_fingerprint()


@pytest.mark.parametrize(
    ("sections", "difference"),
    [
        ({"sampling": {"temperature": 0.7}}, "sampling.temperature: 0.0 -> 0.7"),
        ({"sampling": {"stop": ["a"]}}, 'sampling.stop: [] -> ["a"]'),
        ({"sampling": {"columns": {"n": "x"}}}, 'sampling.columns: {} -> {"n": "x"}'),
        ({"sampling": {"logit_bias": {5: 1}}}, 'sampling.logit_bias: {} -> {"5": 1.0}'),
        ({"template": {"prompt": "{a}"}}, "template.prompt: null -> {a}"),
        ({"template": {"bos": "never"}}, "template.bos: null -> never"),
        ({"model": {"dtype": "float32"}}, "model.dtype: auto -> float32"),
        ({"model": {"max_model_len": 9}}, "model.max_model_len: null -> 9"),
        ({"model": {"longrope": "static"}}, "model.longrope: dynamic -> static"),
        ({"output": {"keep": ["a"]}}, 'output.keep: all -> ["a"]'),
        ({"output": {"token_ids": True}}, "output.token_ids: false -> true"),
        ({"output": {"special_tokens": "keep"}}, "output.special_tokens: null -> keep"),
        ({"output": {"reasoning": "think"}}, "output.reasoning: null -> think"),
        ({"output": {"logprobs": 0}}, "output.logprobs: null -> 0"),
        ({"input": {"prompt": "question"}}, "input.prompt: prompt -> question"),
    ],
)
def test_what_it_depends_on(sections: dict[str, Any], difference: str) -> None:
    assert list(make_fingerprint().differences(make_fingerprint(**sections))) == [difference]
    assert make_fingerprint().hexdigest != make_fingerprint(**sections).hexdigest


def test_what_a_score_depends_on() -> None:
    scoring = {"task": "score", "input": {"continuation": "choices"}}
    new = make_fingerprint(**scoring)
    assert "input.continuation" not in make_fingerprint().others and not [
        name for name in new.others if "sampling" in name
    ]
    assert list(new.differences(make_fingerprint(task="score", input={"continuation": "answers"}))) == [
        "input.continuation: choices -> answers"
    ]
    assert list(new.differences(make_fingerprint(**scoring, output={"logprobs": 0}))) == ["output.logprobs: null -> 0"]
    assert make_fingerprint(**scoring, limits={"max_failed_rows": 1}) == new
    changed = list(make_fingerprint().differences(new))
    assert changed[:2] == ["input.continuation: null -> choices", "sampling.columns: {} -> null"]
    assert changed[-1] == "task: generate -> score"


def test_differences_of_files_and_model() -> None:
    digest = "0123456789abcdef" * 4
    new = compute_fingerprint(
        spec(), {"a.parquet": f"11 bytes, footer {digest}", "c.parquet": "x"}, MODEL | {"weights": "w2"}
    )
    assert list(make_fingerprint().differences(new)) == [
        "model.weights: w1 -> w2",
        "input file a.parquet: 10 bytes, footer aa -> 11 bytes, footer 0123456789ab...",
        "input file b.parquet: missing now",
        "new input file c.parquet",
    ]
    assert new.hexdigest != make_fingerprint().hexdigest


def test_the_format_of_quantized_weights_is_part_of_it_with_its_version() -> None:
    """The resolved format counts, not the key, which is null for a checkpoint that is published quantized."""
    cached = compute_fingerprint(spec(engine={"kv_cache_dtype": "fp8"}), FILES, MODEL, kv_cache="fp8/1")
    assert list(make_fingerprint().differences(cached)) == ["engine.kv_cache_dtype: null -> fp8/1"]
    int8 = compute_fingerprint(spec(model={"quantization": "int8"}), FILES, MODEL, "int8/1")
    assert list(make_fingerprint().differences(int8)) == ["model.quantization: null -> int8/1"]
    published = compute_fingerprint(spec(), FILES, MODEL, "compressed-tensors int4")
    assert list(int8.differences(published)) == ["model.quantization: int8/1 -> compressed-tensors int4"]
    assert compute_fingerprint(spec(), FILES, MODEL, None) == make_fingerprint()


def test_the_order_of_keys_does_not_matter() -> None:
    one = compute_fingerprint(spec(sampling={"logit_bias": {1: 1, 2: 2}}), FILES, MODEL)
    other = compute_fingerprint(spec(sampling={"logit_bias": {2: 2, 1: 1}}), dict(reversed(FILES.items())), MODEL)
    assert one.hexdigest == other.hexdigest


def test_json_round_trip() -> None:
    assert Fingerprint.from_json(make_fingerprint().to_json()) == make_fingerprint()
