"""Commit: Ray Data's last stage. Turns what a worker made of a shard into a part and publishes it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batch.ledger import Counts
from batch.output.folder import OutputFolder
from batch.output.part import encode_part
from batch.output.schema import ERROR
from batch.stages.rows import KEPT, Failure, shard_of, values
from engine.tokenizer import Tokenizer

_RECORD: list[tuple[str, pa.DataType]] = [("shard", pa.int32()), ("counts", pa.string())]
RECORD = pa.schema(_RECORD)


class Commit:
    """One call, one part. Its result is a row for the ledger; none for a shard that was passed through.

    schema:       of every part
    fingerprint:  of the job
    provenance:   written into every part
    """

    def __init__(
        self, output: str, schema: pa.Schema, fingerprint: str, provenance: Mapping[str, object], tokenizer: Tokenizer
    ) -> None:
        self._folder = OutputFolder(output)
        self._schema = schema
        self._fingerprint = fingerprint
        self._provenance = provenance
        self._tokenizer = tokenizer

    def __call__(self, block: pa.Table) -> pa.Table:
        if block.num_rows == 0:
            return RECORD.empty_table()
        shard, expected, part = shard_of(block)
        texts, errors = self._detokenize(block)
        counts = count_rows(block, errors)
        assert counts.rows == expected, f"shard {shard}: {counts.rows} rows came to commit, {expected} were read"
        table = self._table(block, texts, errors)
        self._folder.write(part, encode_part(table, self._fingerprint, shard, counts, self._provenance))
        return pa.table({"shard": [shard], "counts": [json.dumps(asdict(counts))]}, schema=RECORD)

    def _detokenize(self, block: pa.Table) -> tuple[list[str | None], list[Any]]:
        """The text of each sample that was generated, and the error where there is none."""
        texts: list[str | None] = []
        errors = values(block, "error")
        lengths = values(block, "text_length")
        for index, ids in enumerate(values(block, "generated_token_ids")):
            text = None
            if errors[index] is None and ids is not None:
                try:
                    text = self._tokenizer.decode(ids)[: lengths[index]]
                except Exception as error:  # a tokenizer is the checkpoint's: it may raise anything
                    errors[index] = Failure("detokenize", type(error).__name__, str(error)).as_struct()
            texts.append(text)
        return texts, errors

    def _table(self, block: pa.Table, texts: Sequence[str | None], errors: Sequence[Any]) -> pa.Table:
        reasons = pc.if_else([error is None for error in errors], block["finish_reason"], "error")
        made = {
            "generated_text": pa.array(texts, pa.string()),
            "finish_reason": reasons,
            "error": pa.array(errors, ERROR),
        }
        there = {name: block[name] for name in block.column_names} | made
        columns = [there[KEPT + name if KEPT + name in there else name] for name in self._schema.names]
        return pa.table(columns, schema=self._schema)


def count_rows(block: pa.Table, errors: Sequence[Any]) -> Counts:
    """Count the input rows of a block of samples; a row with a failed sample has failed. Tokens: of the others; those
    scored count as the prompt's."""
    rows: list[list[int]] = []
    for index, sample in enumerate(values(block, "sample")):
        if sample == 0:
            rows.append([])
        rows[-1].append(index)
    names = ("num_prompt_tokens", "num_continuation_tokens", "num_generated_tokens")
    prompt_tokens, scored_tokens, generated_tokens = (values(block, name) for name in names)
    failures: Counter[str] = Counter()
    total_prompt = total_generated = 0
    for row in rows:
        if failed := [errors[index] for index in row if errors[index] is not None]:
            failures[failed[0]["code"]] += 1
        else:
            total_prompt += prompt_tokens[row[0]] + sum(scored_tokens[index] or 0 for index in row)
            total_generated += sum(generated_tokens[index] for index in row)
    return Counts(
        ok=len(rows) - failures.total(),
        failed=failures.total(),
        prompt_tokens=total_prompt,
        generated_tokens=total_generated,
        engine_s=values(block.slice(0, 1), "engine_s")[0],
        errors=dict(failures),
    )
