from dataclasses import fields

from moray.engine.metrics import COUNTED, Metrics, prometheus_name


def test_every_counter_says_what_it_counts() -> None:
    assert COUNTED.keys() == {field.name for field in fields(Metrics)}
    assert all(text[0].isupper() and text.endswith(".") for text in COUNTED.values())


def test_units_are_spelled_out() -> None:
    assert prometheus_name("busy_s") == "moray_busy_seconds"
    assert prometheus_name("seqs") == "moray_seqs" and prometheus_name("steps") == "moray_steps"
