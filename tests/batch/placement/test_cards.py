from pathlib import Path

import pytest
from made_jobs import make_spec

from batch.placement.cards import GIB, check_cards
from batch.planning.model_facts import ModelFacts
from engine.errors import SpecError

# Phi-3.5-MoE's
FACTS = ModelFacts("phimoe", 41_873_153_344, 16, 2, "bfloat16", 83_746_306_688, 131_072, 131_072)


def test_a_model_that_no_card_of_the_name_holds(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as wrong:
        check_cards(make_spec(tmp_path), FACTS, ["A100", "L4"])
    assert str(wrong.value) == (
        "workers.accelerator: 78.0 GiB of weights and 16.0 GiB of KV cache for one sequence of 131,072 tokens do not "
        "fit into a card of type A100, 80 GiB at most; lower model.max_model_len"
    )
    with pytest.raises(SpecError, match=r"0.5 of a card of type H200, 70 GiB at most; take a larger card or a smaller"):
        check_cards(make_spec(tmp_path), FACTS, ["H200"], 0.5)


def test_one_that_fits_or_cannot_be_known(tmp_path: Path) -> None:
    for cards in (["H200"], ["A100", "H200"], ["A100", None], ["Intel-GAUDI"], []):
        check_cards(make_spec(tmp_path), FACTS, cards)
    check_cards(make_spec(tmp_path, model={"max_model_len": 8192}), FACTS, ["A100"])
    assert FACTS.weights_bytes + 8192 * FACTS.cache_token_bytes <= 80 * GIB
