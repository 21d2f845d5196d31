"""The name of a run."""

import random
from datetime import UTC, datetime, timedelta

from moray.batch.runtime.run_context import make_run_name


def test_names_of_runs_sort_by_the_time_they_began() -> None:
    """A driver that dies at once is started again within the second."""
    first = datetime(2026, 11, 22, 6, 54, 59, 998_000, tzinfo=UTC)
    names = [make_run_name(first + i * timedelta(milliseconds=1)) for i in range(1000)]
    assert names[0].startswith("20261122T065459.998Z-") and names[2].startswith("20261122T065500.000Z-")
    assert sorted(random.Random(5).sample(names, len(names))) == names
