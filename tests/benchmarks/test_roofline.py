"""The bounds against figures worked out by hand for an H200 (4.3 TB/s, 790 TFLOP/s)."""

import pytest
from bound_quantized import table
from bound_ranks import NODES, draw_experts, gather_seconds, gathers, step_seconds
from bound_ranks import table as ranks_table
from gpu.ideal import load_seconds
from gpu.loads import Request
from gpu.roofline import H200, Step, Weights, Work, expert_layer, experts_hit, seconds, step, weight_bytes
from repository import CONFIGS

from moray.engine.checkpoint.model_config import read_model_config

PHI = read_model_config(CONFIGS / "phi-3.5-moe")
INT8, FP8 = Weights("int8", 8), Weights("fp8 x fp8", 8, speed=2)


def test_the_larger_time_counts() -> None:
    assert H200.seconds(Work(4.3e12, 1.0)) == 1.0
    assert H200.seconds(Work(1.0, 7.9e14)) == 1.0


def test_experts_hit() -> None:
    assert [round(experts_hit(16, 2, tokens), 1) for tokens in (1, 4, 8, 16, 32, 640)] == [2, 6.6, 10.5, 14.1, 15.8, 16]


@pytest.mark.parametrize(("tokens", "us"), [(1, 73), (8, 384), (32, 577), (256, 585), (2048, 815), (4096, 1631)])
def test_the_floor_of_an_expert_layer(tokens: int, us: float) -> None:
    hit = experts_hit(16, 2, tokens)
    assert seconds(H200, expert_layer(PHI, tokens, hit)) * 1e6 == pytest.approx(us, rel=0.01)


@pytest.mark.parametrize(("sequences", "tokens_per_s"), [(1, 328), (8, 609), (32, 1614), (128, 5791), (512, 16310)])
def test_the_bound_of_a_decode_step(sequences: int, tokens_per_s: float) -> None:
    bound = sequences / seconds(H200, step(PHI, Step(sequences, context=640)))
    assert bound == pytest.approx(tokens_per_s, rel=0.03)


def test_the_bound_of_a_step_that_decodes_and_prefills() -> None:
    """Two prompt tokens for every decoded one keep the number of sequences, where prompts are twice the outputs."""
    bound = 128 / seconds(H200, step(PHI, Step(128, 640, prefill_rows=256, prompt_tokens=512)))
    assert bound == pytest.approx(5520, rel=0.03)


def test_the_bound_of_a_load_approaches_that_of_its_steady_state() -> None:
    """Long runs of 128 sequences: within a tenth of the step that decodes and prefills."""
    load = [Request([0] * 512, 256) for _ in range(128 * 8)]
    steady = 128 / seconds(H200, step(PHI, Step(128, 640, prefill_rows=256, prompt_tokens=512)))
    assert 128 * 8 * 256 / load_seconds(H200, PHI, load, 128) == pytest.approx(steady, rel=0.1)


def test_the_bound_of_one_request_is_its_steps() -> None:
    decode = sum(seconds(H200, step(PHI, Step(1, context, hit=2.0))) for context in (101, 102))
    prefill = seconds(H200, step(PHI, Step(0, 0, prefill_rows=100, prompt_tokens=100)))
    assert load_seconds(H200, PHI, [Request([0] * 100, 3)], 1) == pytest.approx(decode + prefill)


def test_the_bytes_of_a_model() -> None:
    """Phi-3.5-MoE has 41.87 billion parameters, of which embedding and head are 262.7 million, routers 2.1 million."""
    assert weight_bytes(PHI) / 1e9 == pytest.approx(83.7, abs=0.05)
    assert weight_bytes(PHI, INT8) / 1e9 == pytest.approx((41.87 - 0.265) + 2 * 0.265, abs=0.05)


def test_quantized_weights_shorten_a_decode_step_by_what_is_read_of_them() -> None:
    """One token reads 2 experts and the attention of 32 layers, 12.75 GB in bf16; the head has 16 bits still."""
    dense, int8 = (seconds(H200, step(PHI, Step(1, 640), weights)) for weights in (Weights("bf16", 16), INT8))
    assert (dense - int8) * 4.3e12 / 1e9 == pytest.approx(12.75 / 2, rel=0.02)


@pytest.mark.parametrize(("tokens", "ratio"), [(1, 2.0), (256, 2.0), (4096, 1.0)])
def test_int8_saves_bytes_alone_and_fp8_by_fp8_time_of_multiplying_too(tokens: int, ratio: float) -> None:
    """At 4,096 tokens the bound of the experts is their multiplication."""
    hit = experts_hit(16, 2, tokens)
    dense, int8, fp8 = (seconds(H200, expert_layer(PHI, tokens, hit, w)) for w in (Weights("bf16", 16), INT8, FP8))
    assert dense / int8 == pytest.approx(ratio, rel=0.01)
    assert dense / fp8 == pytest.approx(2.0, rel=0.01)


def test_the_table_of_bounds_says_what_does_not_fit_and_what_a_gpu_cannot_multiply() -> None:
    rows = [line.split(" | ") for line in table()[2:]]
    assert {row[1] for row in rows if "too large" in row[3]} == {"A100-80GB", "H100"}
    assert {row[2] for row in rows if "too large" in row[3]} == {"bf16"}
    assert {row[1] for row in rows if row[2] == "fp8 x fp8"} == {"H100", "H200"}
    (phi,) = (row for row in rows if row[:3] == ["| phi-3.5-moe", "H200", "bf16"])
    assert phi[4] == "328"


def test_a_gather_by_hand() -> None:
    """256 rows of 12,800 bytes on 4 ranks: 3 quarters over the link, and a copy of all, read and written."""
    node = NODES[1]
    rate = 0.8 * 450e9
    by_hand = 12e-6 + 256 * 12800 * 3 / 4 / rate + 2e-6 + 2 * 256 * 12800 / node.gpu.ceilings.bytes_per_s
    assert gather_seconds(node, 4, 256, 6400) == pytest.approx(by_hand)
    assert gather_seconds(node, 4, 1, 6400) == pytest.approx(12e-6 + 12800 * 3 / 4 / rate)


def test_what_ranks_gather() -> None:
    """A token of Phi-3.5-MoE: heads, hidden states, 2 rows between up and down, 2 rows of experts; then its logits."""
    widths = [rows * width for rows, width in gathers(PHI, Step(1, 640), whole_experts=False)]
    assert widths == [4096, 4096, 2 * 6400, 2 * 4096] * 32 + [32064]
    assert len(list(gathers(PHI, Step(1, 640), whole_experts=True))) == 3 * 32 + 1


def test_experts_whole_on_ranks_are_all_run_somewhere() -> None:
    for ranks in draw_experts(16, 2, 5, 4):
        assert sum(rows for _, rows in ranks) == 10 and 2 <= sum(hit for hit, _ in ranks) <= 10


def test_ranks_of_a_fast_link_are_bounded_by_their_work() -> None:
    """Without gathers two ranks would be twice as fast; with them they are at most that, and slower over PCIe."""
    config, of = PHI, Step(32, 640)
    alone = seconds(NODES[1].gpu.ceilings, step(config, of))
    (nvlink, sent), (pcie, _) = (step_seconds(node, config, of, 2, whole_experts=False) for node in NODES[1:])
    assert nvlink - sent == pytest.approx(alone / 2)
    assert alone / 2 < nvlink < pcie
    assert all(line.count("|") == 8 for line in ranks_table())
