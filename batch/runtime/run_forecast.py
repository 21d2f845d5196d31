"""RunForecast: makes a run's forecast and writes it to the job folder.

The first actor of prepare, which has the tokenizer, collects the sample while the workers load the model.
"""

from moray.batch.forecast.forecast import Forecast
from moray.batch.forecast.forecast_text import describe_forecast, describe_work
from moray.batch.forecast.job_forecast import ForecastOptions, forecast_job, read_forecast, write_forecast
from moray.batch.forecast.sample import PromptSample
from moray.batch.forecast.sample_plan import SamplePlan, choose_rows
from moray.batch.plan.resources import Resources
from moray.batch.runtime.progress_reporting import ProgressReporter
from moray.batch.runtime.run_context import RunContext


class RunForecast:
    """Makes the forecast of one run.

    price:      USD for an hour of a GPU, or of a worker where there are no GPUs; None = no costs in the forecast
    resources:  what the workers ask of Ray, once that is known; before the sample is collected
    """

    def __init__(self, context: RunContext, progress: ProgressReporter, price: float | None = None) -> None:
        self.resources: Resources | None = None
        self._job = context.job
        self._folder = context.folder
        self._ledger = context.ledger
        self._progress = progress
        self._price = price

    def start(self) -> SamplePlan | None:
        """Show what there is to do, and the forecast where the job has one.

        Returns the rows to read for a forecast; None where the job has one.
        """
        self._progress.note(describe_work(self._job, self._ledger))
        forecast = read_forecast(self._folder)
        if forecast is None:
            return choose_rows(self._job.input, self._job.spec)
        self._show(forecast)
        return None

    def on_sample(self, sample: PromptSample) -> None:
        """Make the forecast from the sample and the workers' resources, write it and show it."""
        assert self.resources is not None, "the sample is collected by an actor, whose resources are known"
        worker = self.resources.worker
        options = ForecastOptions(worker.gpu_model, self.resources.max_workers, worker.gpus, price=self._price)
        forecast = forecast_job(self._job, sample, self._folder, {}, options)
        write_forecast(self._folder, forecast)
        self._show(forecast)

    def _show(self, forecast: Forecast) -> None:
        self._progress.note(describe_forecast(self._job.spec.name, forecast))
        self._progress.warn(forecast.warnings)
