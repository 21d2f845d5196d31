"""Tests of the table of shapes: moray and transformers run what it describes, and what one of them lacks is refused."""

from pathlib import Path

import pytest
import run_moray
import run_transformers
import shapes
import torch
from contender import make_work

from moray.engine.models import ARCHITECTURES

SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "dtype": "float32"}  # bfloat16 would round to other tokens
RUN = [name for name, shape in shapes.SHAPES.items() if shape.model_type in ARCHITECTURES]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "qwen3")) for n in RUN])
def test_both_engines_give_the_same_tokens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_moray, "KV_CACHE_BYTES", 8 << 20)
    folder = str(shapes.write(name, tmp_path / name, **SMALL))
    work = make_work(2, 0, 3)
    ours = run_moray.Moray(folder, torch.get_num_threads(), None, 1, False)
    theirs = run_transformers.Static(folder, "eager", "float32")
    tokens = ours.run(work)
    assert tokens == theirs.run(work)
    assert [len(of_request) for of_request in tokens] == [w.max_tokens for w in work]
    values = shapes.SHAPES[name].values
    assert ours.facts()["experts"] == values.get("num_experts", values.get("num_local_experts"))


def test_a_family_that_moray_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "other", shapes.Shape("Other-1B", "other_moe", {}))
    with pytest.raises(shapes.UnknownFamily, match=r"^moray has no family other_moe, of which Other-1B is one\.$"):
        shapes.write("other")


def test_a_checkpoint_that_is_there_is_kept(tmp_path: Path) -> None:
    narrow = SMALL | {"intermediate_size": 32}
    folder = shapes.write("granite", tmp_path / "granite", **narrow)
    before = (folder / "model.safetensors").stat()
    assert shapes.write("granite", folder, **narrow) == folder
    after = (folder / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    # The head is tied: 49,155 rows of embeddings are stored once.
    assert 49155 * 64 < shapes.num_parameters(folder) < 2 * 49155 * 64
