"""Check what goes together with `sampling.structured`, and what task classify and `output.parse` need of it."""

import json

from moray.batch.parsed.json_type import JsonType
from moray.batch.spec.sections import OutputSpec, SamplingSpec
from moray.engine.settings.types import wrong


def check_choices(sampling: SamplingSpec) -> None:
    """Refuse a sampling section that does not have the choices of task classify, and these alone."""
    others = [name for name in SamplingSpec.model_fields if name in sampling.model_fields_set - {"structured"}]
    if others:
        raise wrong(f"task classify samples nothing; drop {', '.join(others)}")
    structured = sampling.structured
    if structured is None or structured.kind != "choice" or len(json.loads(structured.text)) < 2:
        raise wrong("task classify needs structured.choice, a list of at least 2 texts")


def check_structured_output(output: OutputSpec, sampling: SamplingSpec) -> None:
    """Refuse what does not go together with a text that obeys a schema or a grammar, and what needs one."""
    structured, columns = sampling.structured, sampling.structured_columns
    if output.reasoning is not None and (structured is not None or columns):
        raise wrong(
            "reasoning must be null with sampling.structured, which the text obeys from its first token: there is no "
            "room for thoughts"
        )
    if not output.parse:
        return
    if columns:
        raise wrong(
            "parse is for one schema for all rows, but sampling.columns has structured."
            f"{', structured.'.join(columns)}; drop parse and read generated_text"
        )
    if structured is None or structured.kind not in ("json_schema", "json_object"):
        found = "nothing" if structured is None else structured.kind
        raise wrong(f"parse needs JSON: json_schema or json_object in sampling.structured, which has {found}")
    try:
        JsonType.of_structured(structured.kind, structured.text)
    except ValueError as error:
        raise wrong(f"parse: {error}; drop parse and read generated_text") from None
