"""Commit: the last stage. It turns a worker's block into a part and publishes it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from moray.batch.ledger import Counts
from moray.batch.output.failed_rows import merge
from moray.batch.output.folder import OutputFolder
from moray.batch.output.part import STATS_KEY, encode_part, read_part
from moray.batch.output.part_stats import Histogram, PartStats, count_latencies, count_part
from moray.batch.output_columns import ERROR
from moray.batch.parsed.column import parse_column
from moray.batch.parsed.json_type import JsonType
from moray.batch.stages.block_schemas import KEPT, Failure, read_shard, values
from moray.batch.stages.classify import classify
from moray.engine.settings.markers import Markers
from moray.engine.text.reasoning import split_text
from moray.engine.text.tokenizer import Tokenizer

_RECORD: list[tuple[str, pa.DataType]] = [("shard", pa.int32()), ("counts", pa.string())]
RECORD = pa.schema(_RECORD)


class Commit:
    """Publishes one part per call.

    A call returns a row for the ledger, or no row for an empty block.

    output:       path of the output folder
    schema:       schema of every part
    fingerprint:  the job's fingerprint, in hexadecimal digits
    provenance:   metadata that is written into every part
    merges:       True where blocks hold some rows of parts that exist
    markers:      what is around the reasoning, for its column; None = the text is not split
    parsed_type:  type of the column parsed; None = there is none
    choices:      what rows are classified as; empty = the job does not classify
    is_structured:  True where texts obey a schema or a grammar
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
        markers: Markers | None = None,
        parsed_type: JsonType | None = None,
        choices: Sequence[str] = (),
        is_structured: bool = False,
    ) -> None:
        self._folder = OutputFolder(output)
        self._schema = schema
        self._fingerprint = fingerprint
        self._provenance = provenance
        self._tokenizer = tokenizer
        self._merges = merges
        self._markers = markers
        self._parsed_type = parsed_type
        self._choices = choices
        self._is_structured = is_structured

    def __call__(self, block: pa.Table) -> pa.Table:
        if block.num_rows == 0:
            return RECORD.empty_table()
        shard, expected, part = read_shard(block)
        if self._choices:
            block = classify(keep_one_error_per_row(block), self._choices)
        texts, errors = self._detokenize(block)
        table = keep_one_error_per_row(self._make_table(block, texts, errors))
        engine_s, copied = (values(block.slice(0, 1), name)[0] for name in ("engine_s", "copied"))
        num_rows = values(table, "sample").count(0)
        assert num_rows == expected, f"shard {shard}: {num_rows} rows came to commit, {expected} were read"
        latency_ms = count_latencies(_latencies(block, errors))
        if self._merges:
            table, before, latency_ms = self._merge(part, table, latency_ms)
            engine_s, copied = engine_s + before.engine_s, copied + before.copied
        counts, stats = count_part(table, engine_s, latency_ms, is_structured=self._is_structured)
        counts = replace(counts, copied=copied)
        self._folder.publish(part, encode_part(table, self._fingerprint, shard, counts, stats, self._provenance))
        return pa.table({"shard": [shard], "counts": [json.dumps(counts.to_json())]}, schema=RECORD)

    def _merge(self, part: str, retried: pa.Table, latency_ms: Histogram) -> tuple[pa.Table, Counts, Histogram]:
        """Return the rows and the latencies of a part after its failed rows were run again, and its counts before."""
        published, record = read_part(self._folder, part)
        table = merge(published.cast(self._schema), retried)
        if STATS_KEY in record:
            latency_ms = latency_ms + PartStats.from_json(record[STATS_KEY]).histograms["latency_ms"]
        return table, Counts(**record["counts"]), latency_ms

    def _detokenize(self, block: pa.Table) -> tuple[list[str | None], list[Any]]:
        """Return the text and the error of each sample of the block; the text is None where none was generated."""
        texts: list[str | None] = []
        errors = values(block, "error")
        lengths = values(block, "text_length")
        for index, ids in enumerate(values(block, "generated_token_ids")):
            text = None
            if errors[index] is None and ids is not None:
                try:
                    text = self._tokenizer.decode(ids)[: lengths[index]]
                except Exception as error:  # the tokenizer comes with the checkpoint and may raise anything
                    errors[index] = Failure("detokenize", type(error).__name__, str(error)).as_struct()
            texts.append(text)
        return texts, errors

    def _make_table(self, block: pa.Table, texts: Sequence[str | None], errors: Sequence[Any]) -> pa.Table:
        reasons = pc.if_else([error is None for error in errors], block["finish_reason"], "error")
        splits = [(None, text) for text in texts] if self._markers is None else _split(block, texts, self._markers)
        new_columns = {
            "reasoning": pa.array([reasoning for reasoning, _ in splits], pa.string()),
            "generated_text": pa.array([answer for _, answer in splits], pa.string()),
            "finish_reason": reasons,
            "error": pa.array(errors, ERROR),
        }
        if self._parsed_type is not None:
            new_columns["parsed"] = parse_column(texts, reasons.to_pylist(), self._parsed_type)
        columns_by_name = {name: block[name] for name in block.column_names} | new_columns
        columns = [
            columns_by_name[KEPT + name if KEPT + name in columns_by_name else name] for name in self._schema.names
        ]
        return pa.table(columns, schema=self._schema)


def _split(block: pa.Table, texts: Sequence[str | None], markers: Markers) -> list[tuple[str | None, str | None]]:
    """Return the reasoning and the answer in each text of the block; both None where there is no text."""
    begins = values(block, "begins_open")
    return [
        (None, None) if text is None else split_text(text, markers, is_open)
        for text, is_open in zip(texts, begins, strict=True)
    ]


def _latencies(block: pa.Table, errors: Sequence[Any]) -> Iterator[float]:
    """Yield the seconds in the engine of the rows that did not fail, once per row."""
    sources: list[tuple[str, int]] = list(zip(values(block, "source_file"), values(block, "source_row"), strict=True))
    failed = {source for source, error in zip(sources, errors, strict=True) if error is not None}
    rows = zip(sources, values(block, "sample"), values(block, "latency_s"), strict=True)
    return (latency_s for source, sample, latency_s in rows if sample == 0 and source not in failed)


def keep_one_error_per_row(table: pa.Table) -> pa.Table:
    """Reduce each row with a failed sample to that sample: if one sample failed, the row has failed."""
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
    sample_numbers = pa.array([0 if errors[index] is not None else samples[index] for index in kept], pa.int32())
    column_index = table.schema.get_field_index("sample")
    return table.take(pa.array(kept, pa.int64())).set_column(
        column_index, table.schema.field(column_index), sample_numbers
    )
