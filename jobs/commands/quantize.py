"""`moray quantize`: write a checkpoint with quantized weights."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moray.batch.units import size
from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.errors import UserError
from moray.engine.quantization.scheme import ON_LOAD_KINDS


def quantize_model(model: str, out: str, format_: str) -> None:
    """Quantize a model into the folder `out`, and show how far it is. Raises UserError for what cannot be done."""
    kind = next((kind for kind in ON_LOAD_KINDS if kind == format_), None)
    if kind is None:
        raise UserError(f"--format is {format_!r}; it must be {', '.join(ON_LOAD_KINDS[:-1])} or {ON_LOAD_KINDS[-1]}")
    if "://" in out:
        raise UserError(f"OUT is {out!r}; it must be a folder on this machine")
    from moray.engine.runner.quantize_checkpoint import quantize_checkpoint  # imports torch

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console()
    with Progress(*columns, console=console, transient=True) as bar:
        download, quantizing = bar.add_task("Fetching", visible="://" in model), bar.add_task("Quantizing")
        folder = ModelSource(model).download(
            progress=lambda done, total: bar.update(download, completed=done, total=total)
        )
        written = quantize_checkpoint(
            folder, Path(out), kind, lambda done, total: bar.update(quantizing, completed=done, total=total)
        )
    files = "1 file" if written.num_files == 1 else f"{written.num_files} files"
    console.print(
        f"{out}: {size(written.num_bytes)} of weights in {files}, {kind}", markup=False, highlight=False, soft_wrap=True
    )
