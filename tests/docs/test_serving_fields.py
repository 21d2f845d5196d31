"""docs/serving.md names every field that the endpoint takes or refuses."""

import re

from repository import ROOT

from moray.serve.args import EndpointArgs
from moray.serve.openai import refusals
from moray.serve.openai.schemas import ChatBody, CompletionBody, Message, StreamOptions, TextPart

GUIDE = (ROOT / "docs" / "serving.md").read_text()
TEXT = re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL)


def test_every_field_is_named() -> None:
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", TEXT))))
    bodies = (ChatBody, CompletionBody, Message, StreamOptions, TextPart)
    fields = {name for body in bodies for name in body.model_fields}
    tables = (refusals.CHAT, refusals.COMPLETION, refusals.MESSAGE, refusals.SCORE)
    assert (fields | {name for table in tables for name in table}) - named == set()


def test_every_setting_is_named() -> None:
    options = {"model", "dtype"}  # which moray serve --help has
    assert {name for name in EndpointArgs.model_fields if f"`{name}`" not in TEXT} <= options
