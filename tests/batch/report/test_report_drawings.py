"""Charts: positions on the time axis, lanes, cells, text."""

import re
from collections import Counter
from datetime import datetime, timedelta
from itertools import pairwise

import pytest
from made_report import BEGIN

from moray.batch.output.part_stats import count_values
from moray.batch.report import heat_map, histogram_chart
from moray.batch.report.events import WorkerLifetime
from moray.batch.report.time_axis import TimeAxis
from moray.batch.report.time_chart import round_up
from moray.batch.report.words import amount, escape_invisible, milliseconds, percent, whole
from moray.batch.report.worker_timeline import MAX_LANES, lanes


def span(start_s: float, end_s: float) -> tuple[datetime, datetime]:
    return BEGIN + timedelta(seconds=start_s), BEGIN + timedelta(seconds=end_s)


def test_runs_take_width_by_their_length_and_pauses_the_same() -> None:
    axis = TimeAxis([span(0, 100), span(10_000, 10_300), span(90_000, 90_000)], 0, 1000)
    places = [axis.x(BEGIN + timedelta(seconds=s)) for s in (0, 100, 10_000, 10_300, 90_000, 90_001)]
    assert places[0] == 0 and places[-1] == pytest.approx(1000)
    assert places[3] - places[2] == pytest.approx(3 * (places[1] - places[0]))
    assert places[2] - places[1] == pytest.approx(places[4] - places[3])
    assert axis.x(BEGIN + timedelta(seconds=5000)) == places[1], "in a pause: where the run ended"
    assert axis.x(BEGIN - timedelta(seconds=5)) == 0


@pytest.mark.parametrize("seconds", [3, 50, 4000, 100_000, 5_000_000])
def test_ticks_leave_each_other_room(seconds: int) -> None:
    axis = TimeAxis([span(0, seconds), span(2 * seconds, 3 * seconds)], 50, 900)
    ticks = [element for element in axis.render(0, 100) if element.tag == "text"]
    places = sorted(float(tick.attrib["x"]) for tick in ticks)
    assert len(places) >= 3 and all(b - a >= 50 for a, b in pairwise(places))


def process(actor: str, start_s: float, end_s: float, host: str = "h", *, has_died: bool = False) -> WorkerLifetime:
    start, end = span(start_s, end_s)
    return WorkerLifetime(actor, "node", start, end, ready=start, has_died=has_died, about={"host": host})


def test_a_lane_holds_one_worker_of_a_machine_at_a_time() -> None:
    lives = [
        process("a", 0, 5, has_died=True),
        process("b", 1, 9),
        process("a", 5, 9),
        process("c", 10, 20),
        process("d", 10, 20, "g"),
    ]
    assert [[process.actor for process in lane] for lane in lanes(lives)] == [["d"], ["a", "a", "c"], ["b"]]


def test_of_many_workers_those_that_died_are_drawn() -> None:
    lives = [process(str(n), 0, 9, has_died=n >= 190) for n in range(200)]
    drawn = lanes(lives)
    assert len(drawn) == MAX_LANES
    assert sum(process.has_died for lane in drawn for process in lane) == 10


def test_cells_beside_an_even_share() -> None:
    rows = heat_map.cells([[30, 10, 0, 40], [0, 0, 0, 0]])
    assert [cell.relative for cell in rows[0]] == [1.5, 0.5, 0, 2]
    assert [cell.level for cell in rows[0]] == [6, 2, 0, 7]
    assert heat_map.summarize(rows) == [
        "Most used: layer 0, expert 3: 40 tokens, 50.0% of its layer's, 2.00 times an even share.",
        "Least used: layer 0, expert 2: 0 tokens, 0.0% of its layer's, 0.00 times an even share.",
        "1 of 4 experts were never used.",
    ]
    assert heat_map.summarize(heat_map.cells([[0, 0]])) == ["No tokens were counted."]


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (4, 8), (32, 16), (61, 256)])
def test_a_heat_map_of_any_size_stays_in_its_frame(layers: int, experts: int) -> None:
    picture = heat_map.render(heat_map.cells([[1 + e for e in range(experts)] for _ in range(layers)]))
    assert len(re.findall('class="heat', picture)) == layers * experts
    assert max(float(x) for x in re.findall('x="([0-9.]+)"', picture)) < 900


def test_bars_say_what_they_hold() -> None:
    picture = histogram_chart.render("Lengths", count_values(Counter({3: 5, 12: 15})), whole)
    assert "3 to 4: 5 (25.0%)" in picture and "10 to 13: 15 (75.0%)" in picture
    assert "half below 11, 90% below 13, 99% below 13" in picture


def test_the_next_round_number() -> None:
    assert [round_up(value) for value in (0, 0.07, 1, 1.2, 17, 99, 2100)] == pytest.approx(
        [0, 0.08, 1, 1.5, 20, 100, 3000]
    )


def test_text_that_would_mislead_is_named() -> None:
    assert escape_invisible("a\u202eb\x00\u2066\ud800\ufeff") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+2066⟩⟨U+D800⟩⟨U+FEFF⟩"
    assert escape_invisible("a\n\tü 👩\u200d🔬 مرحبا") == "a\n\tü 👩\u200d🔬 مرحبا"
    assert escape_invisible("x" * 1200, 10) == "xxxxxxxxxx… (1,200 characters)"
    assert escape_invisible("x" * 10, 10) == "x" * 10


def test_numbers_as_people_read_them() -> None:
    assert [amount(value) for value in (0, 1.5, 12, 123.4, 999, 1500, 2_000_000)] == [
        "0", "1.5", "12", "123", "999", "1.5 k", "2 M",
    ]  # fmt: skip
    assert [whole(value) for value in (9.4, 1204, 3_400_000)] == ["9", "1,204", "3.4 M"]
    assert [milliseconds(value) for value in (3, 999, 1500, 61_000)] == ["3 ms", "999 ms", "1.5 s", "1 min 01 s"]
    assert [percent(value) for value in (0, 0.0004, 0.5, 0.123, 0.9996, 1)] == [
        "0%", "< 0.1%", "50%", "12.3%", "> 99.9%", "100%",
    ]  # fmt: skip
