"""The host's time of real steps on the stand-in for a GPU: what is launched, replayed, and where time goes."""

import sys
from pathlib import Path

import bench_host
import pytest


def test_steps_on_the_stand_in_are_those_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    contender = bench_host.Contender(Path(sys.executable), num_steps=2)
    decode, eager = contender.measure("decode 2 stops"), contender.measure("decode 2 eager")
    contender.close()
    assert decode["from_graph"] == 1 and decode["kernels"] == 1, "a graph with the head, then the sampling kernel"
    assert eager["from_graph"] == 0 and eager["kernels"] >= 2 * 10, "some ten kernels a layer"
    assert "launch_us_a_layer" in eager
    assert decode["ms"]["logits"] == 0 and eager["ms"]["logits"] > 0
    for result in (decode, eager):
        parts = dict(result["ms"])
        total = parts.pop("total")
        assert min(parts[name] for name in ("schedule", "plan", "inputs", "launch", "sample", "outputs")) > 0
        assert sum(parts.values()) == pytest.approx(total, abs=0.01)
    bench_host.show("decode 2 stops", {"moray": decode, "moray at abc": decode})
    assert "1.00x" in capsys.readouterr().out
