"""The forecast of a planned job: for `moray plan`, and the one that a job's first run leaves in its folder."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from batch.forecast.draw import choose_rows
from batch.forecast.forecast import Crew, Forecast, expect_generated, make_forecast
from batch.forecast.memory import MemoryFit, fit_memory
from batch.forecast.sample import Sample
from batch.forecast.speed import Load, Speed, generated_per_row, speed_of_benchmark, speed_of_earlier_run
from batch.forecast.take import take_sample
from batch.ledger import Counts
from batch.output.folder import JOB, OutputFolder
from batch.placement.cards import CARDS
from batch.planning.model_facts import ITEM_BYTES
from batch.planning.planner import PlannedJob
from batch.spec.problems import nearest
from engine.errors import OutputError, Problem, SpecError
from engine.limits import choose_step_limits
from engine.memory import available_bytes
from engine.tokenizer import Tokenizer

FORECAST = f"{JOB}/forecast.json"
THIS_MACHINE = "this machine"


@dataclass(frozen=True)
class Wanted:
    """What the forecast is asked for.

    card:          type of GPU, by Ray's names; None: the spec's, if it names one
    workers, gpus: how many, and what each takes of cards; None: as the spec says, the least where that is auto
    tokens_per_s:  of one worker; None: as it was measured
    price:         of an hour of a card, or of a worker without one
    """

    card: str | None = None
    workers: int | None = None
    gpus: float | None = None
    tokens_per_s: float | None = None
    price: float | None = None


def sample_job(job: PlannedJob) -> Sample:
    """Raises UserError where the input or the tokenizer cannot be read."""
    draw = choose_rows(job.input, job.spec)
    with TemporaryDirectory(prefix="moray-") as parent:
        tokenizer = Tokenizer(job.model.side_folder(Path(parent)))
        return take_sample(draw, job.spec, job.input.filesystem, job.input.root, tokenizer, job.config)


def forecast_job(
    job: PlannedJob, sample: Sample, folder: OutputFolder, committed: Mapping[int, Counts], wanted: Wanted
) -> Forecast:
    """
    committed: what earlier runs left in the folder
    """
    crew = choose_crew(job, sample, folder, committed, wanted)
    is_scoring = job.spec.task == "score"
    per_row = None if is_scoring else generated_per_row(committed)
    return make_forecast(sample, crew, is_scoring=is_scoring, per_row=per_row, price=wanted.price)


def fit_cards(job: PlannedJob, cards: Sequence[str]) -> list[MemoryFit]:
    """How the model fits into a worker's share of each card; with none named, into the spec's, or into this machine.

    Raises SpecError for a card whose memory is not known.
    """
    spec = job.spec
    named = tuple(cards) or ((spec.workers.accelerator,) if spec.workers.accelerator in CARDS else ())
    if unknown := [card for card in named if card not in CARDS]:
        raise SpecError([Problem("--card", f"{unknown[0]!r} is not known{nearest(unknown[0], list(CARDS))}")])
    share = spec.workers.gpus if spec.workers.gpus != "auto" and spec.workers.gpus > 0 else 1.0
    places = [(card, "cuda", int(CARDS[card].memory_bytes * share)) for card in named]
    if not places and spec.workers.accelerator is None and spec.workers.gpus in ("auto", 0):
        places = [(THIS_MACHINE, "cpu", available_bytes())]
    return [
        fit_memory(
            name,
            replace(spec.engine_config(), device=device),
            job.config,
            weights_bytes=job.facts.weights_bytes,
            itemsize=ITEM_BYTES[job.facts.dtype],
            memory_bytes=memory,
        )
        for name, device, memory in places
    ]


def choose_crew(
    job: PlannedJob, sample: Sample, folder: OutputFolder, committed: Mapping[int, Counts], wanted: Wanted
) -> Crew:
    """The workers that do it, and how fast they are known to be."""
    asked = job.spec.workers
    card = wanted.card or asked.accelerator
    most = asked.min if asked.max == "auto" else asked.max
    workers = max(1, min(wanted.workers or most, len(job.plan.shards)))
    gpus = wanted.gpus
    if gpus is None:
        gpus = (0.0 if card is None else 1.0) if asked.gpus == "auto" else asked.gpus
    speed: Speed | None
    if wanted.tokens_per_s is not None:
        speed = Speed(wanted.tokens_per_s, f"{wanted.tokens_per_s:,.0f} tokens/s a worker, as given")
    else:
        was_there = speed_of_earlier_run(folder) if committed and card == asked.accelerator else None
        speed = was_there or _benchmarked(job, sample, committed, card)
    if speed is None:
        return Crew(workers, gpus)
    return Crew(workers, gpus, round(speed.tokens_per_s * workers, 1), speed.source)


def _benchmarked(job: PlannedJob, sample: Sample, committed: Mapping[int, Counts], card: str | None) -> Speed | None:
    running = sum(row.error is None for row in sample.rows)
    if card is None or not running or job.spec.task == "score":
        return None
    answers = expect_generated(sample, generated_per_row(committed))
    load = Load(
        prompt=sum(row.counted for row in sample.rows) / running,
        output=(answers.high if answers.expected is None else answers.expected) / max(1, sample.input_rows),
        max_num_seqs=choose_step_limits(job.spec.engine_config(), "cuda")[0],
    )
    return speed_of_benchmark(job.config, job.facts.dtype, card, load)


def write_forecast(folder: OutputFolder, forecast: Forecast) -> None:
    """Where that can be done: no job ends for want of its forecast."""
    with suppress(OSError):
        folder.write(FORECAST, forecast.to_json().encode(), durable=False)


def read_forecast(folder: OutputFolder) -> Forecast | None:
    """What the job's first run foretold; None where there is none that can be read."""
    try:
        content = folder.read(FORECAST)
        return None if content is None else Forecast.from_json(content)
    except (OutputError, ValueError, TypeError, KeyError):
        return None
