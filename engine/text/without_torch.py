"""Load tokenizers without torch, in a process that runs no model."""

import sys
from typing import Any

_is_wanted = False


def do_without_torch() -> None:
    """Keep transformers from importing torch in this process, which is one of moray's own and runs no model.

    It imports torch, where that is installed, for the configs of models: seconds, and 200 MB. The process may import
    torch itself later; transformers' models it may not use.
    """
    global _is_wanted
    _is_wanted = True


def hide_torch() -> None:
    """Tell transformers that there is no torch, if this process does without it and has not imported it yet.

    Read in transformers 5.24: `is_torch_available`, from either module, decides before each import of torch.
    """
    if not _is_wanted or "torch" in sys.modules:
        return
    from transformers import utils
    from transformers.utils import import_utils

    modules: tuple[Any, ...] = (utils, import_utils)
    for module in modules:
        module.is_torch_available = _has_no_torch


def _has_no_torch() -> bool:
    return False
