"""A process that runs no model loads tokenizers without torch, and they do what they do elsewhere."""

import json
import subprocess
import sys

from made_jobs import TINY

from moray.engine.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "What is 2 + 3?"}]
SCRIPT = f"""
import json, sys
from moray.engine.text.tokenizer import Tokenizer
from moray.engine.text.without_torch import do_without_torch

do_without_torch()
tokenizer = Tokenizer({str(TINY)!r})
ids = tokenizer.encode_chat({CHAT!r})
print(json.dumps([ids, tokenizer.decode(ids), sorted(tokenizer.stop_token_ids), "torch" in sys.modules]))
import torch
from moray.engine.engine import Engine
"""


def test_a_process_may_do_without_torch_and_import_it_later() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    here = Tokenizer(str(TINY))
    ids = here.encode_chat(CHAT)
    assert json.loads(done.stdout) == [ids, here.decode(ids), sorted(here.stop_token_ids), False]
    assert done.stderr == ""


def test_where_torch_is_imported_transformers_keeps_it() -> None:
    from transformers.utils import is_torch_available

    Tokenizer(str(TINY))
    assert is_torch_available()
