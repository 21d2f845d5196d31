import pytest

from moray.batch.units import count, duration, memory, short, size


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 "), (999, "999 "), (1000, "1 k"), (194_720, "195 k"), (999_500, "1 M"), (41_900_000_000, "41.9 G")],
)
def test_short(number: int, text: str) -> None:
    assert short(number) == text


def test_size() -> None:
    assert [size(n) for n in (0, 512, 779_000, 10**16)] == ["0 B", "512 B", "779 kB", "10 PB"]


def test_memory() -> None:
    assert [memory(n) for n in (512, 107_374_182, 107_374_183, 3 << 29)] == ["512 B", "107 MB", "0.1 GiB", "1.5 GiB"]


def test_count() -> None:
    assert [count(n, "row") for n in (0, 1, 1204)] == ["0 rows", "1 row", "1,204 rows"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"),
     (3600, "1 h 00 min"), (400_000, "111 h 06 min")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
