"""What must not be in the environment that moray runs in."""

from importlib.metadata import PackageNotFoundError, version

from engine.errors import UserError


def check_environment() -> None:
    """Raises UserError where Hugging Face's `kernels` is installed: transformers would take our folder for it, or
    Python that package for our folder."""
    try:
        found = version("kernels")
    except PackageNotFoundError:
        return
    raise UserError(
        f"the package kernels {found} is installed, and moray has a folder of that name which transformers would mix "
        "up with it; run moray in an environment of its own, or `pip uninstall kernels`"
    )
