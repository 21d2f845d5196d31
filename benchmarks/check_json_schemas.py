"""Check what constrained JSON is worth on public JSON schemas: whether it obeys them, and which schemas are refused.

    python benchmarks/check_json_schemas.py PATH ... [--walks 4] [--max-tokens 200] [--tokenizer examples/tiny-phimoe]

A PATH is a folder, a wheel, a zip or a tar of schemas (as `pip download` and `npm pack` write them); nothing of them is
kept. A file is a schema, a list of tests in the form of JSON-Schema-Test-Suite, or a schema with definitions, of which
each is a schema too. Of each schema that is accepted, as the endpoint accepts it:

* random walks over the masks, which are texts that a model without any knowledge could write, are validated by
  jsonschema-rs, formats included;
* instances of the test suite that are wrong must not be accepted. Right ones may be: an object that lists its
  properties gets no others, and JSON is compact.

The walk prefers what ends a text after a random number of tokens, so that most of them end.
"""

import argparse
import io
import json
import random
import re
import statistics
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema_rs
import numpy as np
import report
from rich.console import Console
from rich.table import Table

from moray.engine.errors import RequestError
from moray.engine.structured import json_schema
from moray.engine.structured.constraint import Structured
from moray.engine.text.grammar import Grammars, Matcher, words_of
from moray.engine.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
DRAFTS = {
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}
OTHER_DRAFTS = ("draft3", "draft-next", "v1")  # folders of the suite for drafts that jsonschema-rs does not know
OPTIONAL = "an invalid instance of an optional test"  # what the suite does not demand, such as leap seconds
MAX_DEFINITIONS = 100  # of one file
console = Console(highlight=False, soft_wrap=True)


class Test(NamedTuple):
    """An instance of the test suite, and whether it obeys its schema."""

    data: Any
    is_valid: bool


class Case(NamedTuple):
    """A schema, where it is from, and instances of the test suite."""

    place: str
    schema: Any
    tests: list[Test]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--walks", type=int, default=4, help="random walks of each schema")
    parser.add_argument("--max-tokens", type=int, default=200, help="of a walk, which is cut there")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "examples" / "tiny-phimoe", help="folder of a model")
    parser.add_argument("--name", help="of the results' file; none = write none")
    args = parser.parse_args()
    checks = {path.name: Check(args.tokenizer, args.walks, args.max_tokens) for path in args.paths}
    for path in args.paths:
        for case in find_cases(path):
            checks[path.name].run(case)
    show(checks)
    if args.name:
        figures = {name: check.figures() for name, check in checks.items()}
        result = report.context("llguidance", "jsonschema-rs") | {"corpora": figures}
        console.print(f"written: {report.save(args.name, 'cpu', result)}")
    raise SystemExit(any(one["what"] != OPTIONAL for check in checks.values() for one in check.mistakes))


class Check:
    """Runs the schemas of one corpus and counts what came out."""

    def __init__(self, tokenizer_folder: Path, num_walks: int, max_tokens: int) -> None:
        config = json.loads((tokenizer_folder / "config.json").read_text())
        ends = config["eos_token_id"]
        self._tokenizer = Tokenizer(tokenizer_folder, [ends] if isinstance(ends, int) else ends)
        self._vocab_size: int = config["vocab_size"]
        self._stops = self._tokenizer.stop_token_ids
        self._grammars = Grammars(self._tokenizer, self._vocab_size, self._stops)
        self._closing = self._find_closing()
        self._num_walks = num_walks
        self._max_tokens = max_tokens
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # reason of a refusal -> place of the first
        self.mistakes: list[dict[str, Any]] = []
        self.seconds: list[float] = []

    def run(self, case: Case) -> None:
        try:
            validator = jsonschema_rs.validator_for(case.schema, validate_formats=True, offline=True)
        except (ValueError, jsonschema_rs.ReferencingError):
            self.counts["not a schema for jsonschema-rs"] += 1
            return
        self.counts["schemas"] += 1
        started = time.perf_counter()
        try:
            structured = Structured.from_value("json_schema", case.schema)
            structured.check()
            self._grammars.compile(structured)
        except RequestError as error:
            for reason in find_reasons(error.message):
                self.refused[reason] += 1
                self.examples.setdefault(reason, f"{case.place}: {error.message[:200]}")
            return
        finally:
            self.seconds.append(time.perf_counter() - started)
        self.counts["accepted"] += 1
        for number in range(self._num_walks):
            self._walk(case, structured, validator, random.Random(number))
        for test in case.tests:
            self._offer(case, structured, test)

    def _walk(self, case: Case, structured: Structured, validator: Any, chance: random.Random) -> None:
        """Write a text of random tokens that the masks allow, and validate it."""
        matcher, words = self._grammars.matcher(structured), np.zeros(words_of(self._vocab_size), np.int32)
        tokens: list[int] = []
        num_free = chance.randint(0, self._max_tokens // 4)
        while not matcher.has_ended and len(tokens) < self._max_tokens:
            matcher.fill(words.data.cast("B"))
            if matcher.error is not None:
                self.counts["walks that became too complex"] += 1
                return
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[: self._vocab_size])
            ends = np.intersect1d(allowed, self._closing) if len(tokens) >= num_free else allowed[:0]
            token = int(chance.choice(ends if len(ends) and chance.random() < 0.9 else allowed))
            if token in self._stops:
                break
            tokens.append(token)
            matcher.accept(token)
        else:
            if not matcher.has_ended:
                self.counts["walks cut by the limit"] += 1
                return
        text = self._tokenizer.decode(tokens)
        self.counts["walks that ended"] += 1
        try:
            value = json.loads(text, parse_float=Decimal)  # 1E400 is a number, and no float
        except ValueError:
            self._note("a text that is not JSON", case, text)
            return
        if not validator.is_valid(value):
            reason = next(iter(validator.iter_errors(value))).message
            self._note("an invalid text", case, text, reason[:200])

    def _offer(self, case: Case, structured: Structured, test: Test) -> None:
        """Offer an instance of the test suite, as compact JSON."""
        text = json.dumps(test.data, ensure_ascii=False, separators=(",", ":"))
        (tokens,) = self._tokenizer.encode_texts([text], add_special_tokens=False)
        is_accepted = self._accepts(self._grammars.matcher(structured), tokens)
        self.counts[f"{'valid' if test.is_valid else 'invalid'} instances"] += 1
        self.counts[f"{'valid' if test.is_valid else 'invalid'} instances accepted"] += is_accepted
        if is_accepted and not test.is_valid:
            is_optional = "/optional/" in case.place
            self._note(OPTIONAL if is_optional else "an invalid instance", case, text)

    def _accepts(self, matcher: Matcher, tokens: list[int]) -> bool:
        for token in tokens:
            if matcher.has_ended:
                return False
            matcher.accept(token)
            if matcher.error is not None:
                return False
        if matcher.has_ended:
            return True
        words = np.zeros(words_of(self._vocab_size), np.int32)
        matcher.fill(words.data.cast("B"))
        return any(words[stop // 32] >> (stop % 32) & 1 for stop in self._stops)

    def _note(self, what: str, case: Case, text: str, reason: str = "") -> None:
        self.mistakes.append({"what": what, "place": case.place, "schema": case.schema, "text": text, "reason": reason})

    def _find_closing(self) -> Any:
        """Return the tokens that lead to the end of a text."""
        texts = [self._tokenizer.decode_continuation([i]) for i in range(self._vocab_size)]
        return np.array([*(i for i, text in enumerate(texts) if text[:1] in ('"', "}", "]")), *self._stops])

    def figures(self) -> dict[str, Any]:
        """Return what is written to the results: no schema of the corpus, but the place of a mistake."""
        ms = sorted(1000 * one for one in self.seconds)
        return {
            **self.counts,
            "refused": dict(self.refused.most_common()),
            "mistakes": dict(Counter(f"{one['what']}: {Path(one['place']).name}" for one in self.mistakes)),
            "compile_ms": {"p50": round(statistics.median(ms), 1), "p99": round(ms[int(0.99 * (len(ms) - 1))], 1),
                           "max": round(ms[-1], 1)} if ms else {},
        }  # fmt: skip


def find_reasons(message: str) -> list[str]:
    """Return the keywords for which a schema was refused, or else what the message says."""
    if (keys := re.search(r"Unimplemented keys: (\[.*?\])", message)) is not None:
        return [f"keyword {key}" for key in json.loads(keys[1])]
    first = re.sub(r"^json_schema( at .*?)?: ", "", message.splitlines()[0])
    return [re.sub(r"[\"'`].*?[\"'`]|/.*?/|\w[\w-]*:/\S+|\d[\d,]*", "*", first)[:90]]


def find_cases(path: Path) -> Iterator[Case]:
    """Yield the schemas of a folder or an archive."""
    for place, text in read_files(path):
        try:
            value = json.loads(text)
        except ValueError:
            continue
        parts = Path(place).parts
        if any(part in OTHER_DRAFTS for part in parts):
            continue
        draft = next((DRAFTS[part] for part in parts if part in DRAFTS), None)
        if isinstance(value, list):
            yield from find_tests(place, value, draft)
        elif isinstance(value, dict) and is_schema(value):
            yield Case(place, value, [])
            yield from find_definitions(place, value)


def read_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the JSON files of a folder or an archive, by their places."""
    if path.is_dir():
        for file in sorted(path.rglob("*.json")):
            yield str(file.relative_to(path)), file.read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".json"):
                    yield name, archive.read(name)
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as files:
            for member in files.getmembers():
                if member.isfile() and member.name.endswith(".json"):
                    yield member.name, (files.extractfile(member) or io.BytesIO()).read()
    else:
        raise SystemExit(f"{path}: must be a folder, a wheel, a zip or a tar")


def find_tests(place: str, value: list[Any], draft: str | None) -> Iterator[Case]:
    """Yield the schemas of a file of JSON-Schema-Test-Suite, each of the draft of its folder."""
    for group in value:
        if not isinstance(group, dict) or not {"schema", "tests"} <= group.keys():
            continue
        schema = group["schema"]
        if isinstance(schema, dict) and draft is not None:
            schema = {"$schema": draft} | schema
        tests = [Test(one["data"], one["valid"]) for one in group["tests"] if "valid" in one]
        yield Case(f"{place}: {group.get('description')}", schema, tests)


def is_schema(value: dict[str, Any]) -> bool:
    return "$schema" in value or ("type" in value and "properties" in value) or "definitions" in value


def find_definitions(place: str, document: dict[str, Any]) -> Iterator[Case]:
    """Yield the definitions of a schema, each a schema with those that it refers to."""
    for keyword in ("definitions", "$defs"):
        found = document.get(keyword)
        definitions: dict[str, Any] = found if isinstance(found, dict) else {}
        for name in list(definitions)[:MAX_DEFINITIONS]:
            used = {name}
            todo = [definitions[name]]
            while todo:
                for _, inner in json_schema.walk(todo.pop()):
                    reference = inner.get("$ref") if isinstance(inner, dict) else None
                    target = str(reference).removeprefix(f"#/{keyword}/") if reference else None
                    if target in definitions and target not in used:
                        used.add(target)
                        todo.append(definitions[target])
            head = {key: document[key] for key in ("$schema",) if key in document}
            schema = {**head, "$ref": f"#/{keyword}/{name}", keyword: {key: definitions[key] for key in sorted(used)}}
            yield Case(f"{place}: {keyword} {name}", schema, [])


def show(checks: dict[str, Check]) -> None:
    table = Table(
        "corpus", "schemas", "accepted", "walks", "invalid", "invalid instances accepted", "compile ms p50, p99"
    )
    for name, check in checks.items():
        counts, ms = check.counts, check.figures()["compile_ms"]
        wrong = Counter(one["what"] for one in check.mistakes)
        table.add_row(
            name,
            str(counts["schemas"]),
            f"{counts['accepted']} ({counts['accepted'] / max(1, counts['schemas']):.0%})",
            str(counts["walks that ended"]),
            str(wrong.total() - wrong["an invalid instance"] - wrong[OPTIONAL]),
            f"{wrong['an invalid instance']} + {wrong[OPTIONAL]} optional of {counts['invalid instances']}",
            f"{ms.get('p50')}, {ms.get('p99')}",
        )
    console.print(table)
    for name, check in checks.items():
        console.print(f"{name}: {dict(check.counts)}")
        for reason, number in check.refused.most_common(15):
            console.print(f"  {number:4}  {reason}   e.g. {check.examples[reason]}", markup=False)
        shown: set[str] = set()
        for one in check.mistakes:  # drafts repeat each other: each test once
            if (name := Path(one["place"]).name + one["text"]) not in shown:
                shown.add(name)
                console.print(f"  MISTAKE {json.dumps(one, ensure_ascii=False)[:1000]}", markup=False)


if __name__ == "__main__":
    main()
