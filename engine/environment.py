"""What must hold of the Python environment before a model is loaded."""

from importlib.metadata import PackageNotFoundError, version

from engine.errors import UserError


def check_environment() -> None:
    """Raise UserError where a distribution named `kernels` is installed.

    It is a Hugging Face package that installs over, or is shadowed by, our folder of that name; transformers imports
    whichever comes first and then fails to load with an error that does not name the cause.
    """
    try:
        found = version("kernels")
    except PackageNotFoundError:
        return
    raise UserError(
        f"the package kernels {found} is installed, and moray has a folder of that name which transformers would mix "
        "up with it; run moray in an environment of its own, or `pip uninstall kernels`"
    )
