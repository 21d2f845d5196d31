"""Commit: Ray Data's last stage. Turns what a worker made of a shard into a part and publishes it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batch.ledger import Counts
from batch.output.folder import OutputFolder
from batch.output.part import count_rows, encode_part, read_part
from batch.output.schema import ERROR
from batch.output.tally import Histogram, Tally, count_latencies, tally_rows
from batch.retry import merge
from batch.stages.rows import KEPT, Failure, shard_of, values
from engine.tokenizer import Tokenizer

_RECORD: list[tuple[str, pa.DataType]] = [("shard", pa.int32()), ("counts", pa.string())]
RECORD = pa.schema(_RECORD)


class Commit:
    """One call, one part. Its result is a row for the ledger; none for a shard that was passed through.

    schema:       of every part
    fingerprint:  of the job
    provenance:   written into every part
    merges:       blocks hold some rows of parts that are there
    """

    def __init__(
        self,
        output: str,
        schema: pa.Schema,
        fingerprint: str,
        provenance: Mapping[str, object],
        tokenizer: Tokenizer,
        *,
        merges: bool = False,
    ) -> None:
        self._folder = OutputFolder(output)
        self._schema = schema
        self._fingerprint = fingerprint
        self._provenance = provenance
        self._tokenizer = tokenizer
        self._merges = merges

    def __call__(self, block: pa.Table) -> pa.Table:
        if block.num_rows == 0:
            return RECORD.empty_table()
        shard, expected, part = shard_of(block)
        texts, errors = self._detokenize(block)
        table = one_error_a_row(self._table(block, texts, errors))
        engine_s = values(block.slice(0, 1), "engine_s")[0]
        counts = count_rows(table, engine_s)
        assert counts.rows == expected, f"shard {shard}: {counts.rows} rows came to commit, {expected} were read"
        latency_ms = count_latencies(_latencies(block, errors))
        if self._merges:
            table, counts, latency_ms = self._merge(part, table, engine_s, latency_ms)
        tally = tally_rows(table, latency_ms)
        self._folder.publish(part, encode_part(table, self._fingerprint, shard, counts, tally, self._provenance))
        return pa.table({"shard": [shard], "counts": [json.dumps(asdict(counts))]}, schema=RECORD)

    def _merge(
        self, part: str, again: pa.Table, engine_s: float, latency_ms: Histogram
    ) -> tuple[pa.Table, Counts, Histogram]:
        """What the part holds after some of its rows, which had failed, were run again."""
        there, record = read_part(self._folder, part)
        table = merge(there.cast(self._schema), again)
        if "tally" in record:
            latency_ms = latency_ms + Tally.from_json(record["tally"]).histograms["latency_ms"]
        return table, count_rows(table, record["counts"]["engine_s"] + engine_s), latency_ms

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


def _latencies(block: pa.Table, errors: Sequence[Any]) -> Iterator[float]:
    """Seconds in the engine, of rows that did not fail, once each."""
    sources: list[tuple[str, int]] = list(zip(values(block, "source_file"), values(block, "source_row"), strict=True))
    failed = {source for source, error in zip(sources, errors, strict=True) if error is not None}
    rows = zip(sources, values(block, "sample"), values(block, "latency_s"), strict=True)
    return (latency_s for source, sample, latency_s in rows if sample == 0 and source not in failed)


def one_error_a_row(table: pa.Table) -> pa.Table:
    """Where a sample failed the row has failed: of its samples that one stays, as the row's only one."""
    if table["error"].null_count == table.num_rows:
        return table
    samples, errors = values(table, "sample"), values(table, "error")
    rows: list[list[int]] = []
    for index, sample in enumerate(samples):
        if sample == 0:
            rows.append([])
        rows[-1].append(index)
    kept: list[int] = []
    for row in rows:
        kept += [index for index in row if errors[index] is not None][:1] or row
    if len(kept) == table.num_rows:
        return table
    numbers = pa.array([0 if errors[index] is not None else samples[index] for index in kept], pa.int32())
    at = table.schema.get_field_index("sample")
    return table.take(pa.array(kept, pa.int64())).set_column(at, table.schema.field(at), numbers)
