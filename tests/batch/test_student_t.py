import pytest

from moray.batch.student_t import student_t


@pytest.mark.parametrize(("degrees", "table"), [(5, 2.571), (10, 2.228), (30, 2.042), (99, 1.984)])
def test_95_percent(degrees: int, table: float) -> None:
    assert student_t(degrees, 0.95) == pytest.approx(table, rel=0.01)


@pytest.mark.parametrize(("degrees", "table"), [(3, 2.353), (5, 2.015), (30, 1.697)])
def test_90_percent(degrees: int, table: float) -> None:
    assert student_t(degrees, 0.9) == pytest.approx(table, rel=0.02)
