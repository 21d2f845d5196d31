import pytest

from jobs.quantities import count, short, size


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 "), (999, "999 "), (1000, "1 k"), (194_720, "195 k"), (999_500, "1 M"), (41_900_000_000, "41.9 G")],
)
def test_short(number: int, text: str) -> None:
    assert short(number) == text


def test_size() -> None:
    assert [size(n) for n in (0, 512, 779_000, 10**16)] == ["0 B", "512 B", "779 kB", "10 PB"]


def test_count() -> None:
    assert [count(n, "row") for n in (0, 1, 1204)] == ["0 rows", "1 row", "1,204 rows"]
