"""Job names as values of Ray's labels, and what the metrics of a job say."""

import pytest

from moray.batch.runtime.prometheus import GAUGES, to_label
from moray.engine.metrics import prometheus_name


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("sums & more: 50% <done>", "sums & more: 50% <done>"),
        ("Résumés", "R%C3%A9sum%C3%A9s"),
        ("one \N{EM DASH} two", "one %E2%80%94 two"),
        ("\N{SLIGHTLY SMILING FACE}", "%F0%9F%99%82"),
        ("\ud800", "?"),
        ("", ""),
    ],
)
def test_labels_are_ascii(name: str, label: str) -> None:
    assert to_label(name) == label


def test_gauges_follow_the_conventions_of_prometheus() -> None:
    assert all(text[0].isupper() and text.endswith(".") for text in GAUGES.values())
    seconds = {prometheus_name(name) for name, text in GAUGES.items() if "seconds" in text.lower()}
    assert seconds == {"moray_eta_seconds", "moray_worker_seconds", "moray_gpu_seconds"}
