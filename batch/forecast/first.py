"""FirstForecast: what a run foretells and leaves in the job folder. Its sample is taken by the first actor of prepare,
which has the tokenizer, while the workers load the model."""

from collections.abc import Callable

from batch.forecast.brief import brief_forecast, brief_work
from batch.forecast.draw import Draw, choose_rows
from batch.forecast.of_job import Wanted, forecast_job, read_forecast, write_forecast
from batch.forecast.sample import Sample
from batch.ledger import Ledger
from batch.output.folder import OutputFolder
from batch.placement.resources import Resources
from batch.planning.planner import PlannedJob


class FirstForecast:
    """
    note:   shows a person a line
    price:  USD for an hour of a card, or of a worker; None = no money is foretold
    """

    def __init__(
        self, job: PlannedJob, folder: OutputFolder, note: Callable[[str], None], price: float | None = None
    ) -> None:
        self._job = job
        self._folder = folder
        self._note = note
        self._price = price

    def start(self, ledger: Ledger) -> Draw | None:
        """Say what there is to do; returns the rows to look at, None where the job has its forecast and keeps it."""
        self._note(brief_work(self._job, ledger))
        forecast = read_forecast(self._folder)
        if forecast is None:
            return choose_rows(self._job.input, self._job.spec)
        self._note(brief_forecast(self._job.spec.name, forecast))
        return None

    def take(self, sample: Sample, resources: Resources) -> None:
        """Write down and say what the job will take with these workers."""
        wanted = Wanted(resources.worker.card, resources.max_workers, resources.worker.gpus, price=self._price)
        forecast = forecast_job(self._job, sample, self._folder, {}, wanted)
        write_forecast(self._folder, forecast)
        self._note(brief_forecast(self._job.spec.name, forecast))
