"""What a job knows of its sequences' lengths before a worker starts, as a table."""

from pathlib import Path
from typing import Any

import pytest
from made_jobs import make_spec

from moray.batch.ledger import Counts
from moray.batch.plan.lengths import engine_config_for

SCORING = {"task": "score", "input": {"continuation": "answer"}}


@pytest.mark.parametrize(
    ("sections", "committed", "mean"),
    [
        ({"sampling": {"max_tokens": 100}}, {}, 512 + 50),
        ({"sampling": {"max_tokens": 100, "columns": {"max_tokens": "limit"}}}, {}, 512 + 128),
        (SCORING, {}, 512),
        ({}, {0: Counts(ok=10, prompt_tokens=300, generated_tokens=80)}, 30 + 4),
        ({}, {0: Counts(failed=10), 3: Counts(ok=5, prompt_tokens=50, generated_tokens=100)}, 10 + 10),
        ({}, {0: Counts(failed=10)}, 512 + 4),
        ({"sampling": {"n": 4}}, {0: Counts(ok=10, prompt_tokens=300, generated_tokens=800)}, 30 + 10),
    ],
)
def test_rows_that_are_done_say_how_long_sequences_are_and_before_that_the_spec(
    tmp_path: Path, sections: dict[str, Any], committed: dict[int, Counts], mean: int
) -> None:
    spec = make_spec(tmp_path, **sections)
    assert engine_config_for(spec, committed).mean_cached_tokens == mean
