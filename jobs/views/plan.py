"""Render the plan of `moray plan` for a terminal, from what plan_values.describe() returns."""

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moray.batch.plan.model_info import ModelInfo
from moray.batch.units import count, duration, memory, short, size

BAR_WIDTH = 30  # characters of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"  # characters that fill 0 to 7 eighths of a cell


def render(plan: dict[str, Any]) -> Group:
    """Render a plan as a table of names and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(plan):
        table.add_row(name, Text(value) if isinstance(value, str) else value)
    return Group(Text(plan["name"], style="bold cyan"), table)


def _lines(plan: dict[str, Any]) -> Iterator[tuple[str, RenderableType]]:
    source, output = plan["input"], plan["output"]
    paths = source["path"] if isinstance(source["path"], str) else ", ".join(source["path"])
    facts = {name: value for name, value in plan["model"].items() if name != "path"}
    rows = f"{count(source['rows'], 'row')} in {count(source['files'], 'file')}, {size(source['bytes'])}"
    yield "Input", f"{paths}: {rows}"
    yield "", f"reads {', '.join(source['read_columns'])}; keeps {', '.join(source['kept_columns']) or 'none'}"
    yield "Model", f"{plan['model']['path']}: {_model_line(ModelInfo(**facts))}"
    stored = "" if facts["kv_cache"] is None else f" in {facts['kv_cache']}"
    yield "", f"{size(facts['cache_token_bytes'])} of KV cache a token{stored}, context {plan['max_model_len']:,}"
    yield "Work", f"{count(plan['shards'], 'shard')} of {count(plan['shard_rows'], 'row')}, {_work(plan)}"
    yield from _prompt_lines(plan)
    yield from _memory_lines(plan["memory"])
    yield from _time_lines(plan["forecast"])
    yield "Output", f"{output['path']}/{output['parts']}"
    yield "", ", ".join(f"{name} {kind}" for name, kind in output["columns"].items())
    yield "Done", _done(plan, plan["committed"])
    for warning in plan["warnings"]:
        yield "Warning", Text(warning, "yellow")


def _model_line(facts: ModelInfo) -> str:
    return (
        f"{facts.architecture}, {short(facts.num_parameters)} parameters, "
        f"{facts.num_experts_per_tok} of {facts.num_experts} experts a token, "
        f"{size(facts.weights_bytes)} as {facts.types}"
    )


def _work(plan: dict[str, Any]) -> str:
    if plan["task"] == "score":
        return f"continuations in {plan['input']['continuation']} to score"
    if plan["task"] == "classify":
        return f"{count(len(plan['choices']), 'choice')} to score in each row"
    bound = "about" if plan["rows_set_max_tokens"] else "at most"
    expected = plan["forecast"]["generated_tokens"]["expected"]
    likely = "" if expected is None else f", {expected:,} expected"
    return f"{bound} {count(plan['max_generated_tokens'], 'token')} to generate{likely}"


def _prompt_lines(plan: dict[str, Any]) -> Iterator[tuple[str, RenderableType]]:
    sample, tokens = plan["sample"], plan["forecast"]["prompt_tokens"]
    if sample["is_whole"]:
        yield "Prompts", f"{count(tokens['expected'], 'token')} in all rows that run"
    else:
        sampled = f"from {sample['rows']:,} of {count(plan['input']['rows'], 'row')}"
        yield "Prompts", f"{tokens['expected']:,} tokens, {tokens['low']:,} to {tokens['high']:,} at 95%, {sampled}"
    if sample["reach"] < 1:
        yield "", f"sampled from the first {sample['reach']:.2%} of each row group: the input is large"
    if (lengths := sample["prompt_tokens"]) is not None:
        quantiles = f"half have at most {lengths['median']:,}, 95% at most {lengths['p95']:,}"
        yield "", f"{lengths['mean']:,} tokens a prompt, {quantiles}, the longest {lengths['longest']:,}"
        yield "", _bars(sample["histogram"])
    scope = "" if sample["is_whole"] else " of the sample"
    if sample["duplicate_rows"]:
        yield "", f"{count(sample['duplicate_rows'], 'row')}{scope} with the prompt of an earlier row"
    if sample["shared_prefix_tokens"]:
        yield "", f"all prompts{scope} begin with the same {count(sample['shared_prefix_tokens'], 'token')}"
    yield "Errors", _errors(sample, plan["forecast"]["error_rows"])


def _bars(histogram: list[dict[str, int]]) -> Table:
    """Render a bar chart of the rows by the length of their prompts."""
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    max_rows = max(bucket["rows"] for bucket in histogram)
    for bucket in histogram:
        bar = Text(_bar(bucket["rows"] / max_rows), style="cyan")
        bar.append(f" {bucket['rows']:,}", style="default")
        last = f"..{bucket['last']:,}" if bucket["last"] > bucket["first"] else ""
        table.add_row(f"{bucket['first']:,}{last}", bar)
    return table


def _bar(share: float) -> str:
    eighths = round(8 * BAR_WIDTH * share) or (share > 0)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _errors(sample: dict[str, Any], expected: dict[str, int]) -> str:
    if not expected:
        return "none before the engine" + ("" if sample["is_whole"] else ", in the sample")
    codes = ", ".join(f"{code} {rows:,}" for code, rows in expected.items())
    about = "" if sample["is_whole"] else "about "
    return f"{about}{count(sum(expected.values()), 'row')} will fail: {codes}"


def _memory_lines(fits: list[dict[str, Any]]) -> Iterator[tuple[str, RenderableType]]:
    if len(fits) > 1:
        is_split = any(fit["gpus"] > 1 for fit in fits)
        what = "of each GPU" if is_split else f"{memory(fits[0]['weights_bytes'])} of weights"
        yield "Memory", f"{what}; at once: sequences of mean and of longest length"
        yield "", _gpu_table(fits, is_split=is_split)
    for fit in fits if len(fits) == 1 else ():
        name = f"{_title(fit)}, {memory(fit['memory_bytes'])}{' each' if fit['gpus'] > 1 else ''}"
        if not fit["fits"]:
            yield "Memory", f"{name}: {fit['why_not']}"
            continue
        working = f"about {memory(fit['working_bytes'])} of working memory, " if fit["working_bytes"] else ""
        cache = f"{memory(fit['cache_bytes'])} of KV cache, {fit['cache_tokens']:,} tokens"
        yield "Memory", f"{name}: {memory(fit['weights_bytes'])} of weights, {working}{cache}"
        if (found := fit["sequences"]) is not None:
            mean = f"{found['of_mean']:,} sequences of {found['mean_tokens']:,} tokens (the mean)"
            longest = f"{found['of_longest']:,} of {found['longest_tokens']:,} (the longest)"
            context = f"{found['of_context']:,} of {found['context_tokens']:,} (the context)"
            yield "", f"at once {mean}, {longest}, {context}, all at full length"
        tokens = count(fit["max_num_batched_tokens"], "token")
        yield "", f"a step has at most {count(fit['max_num_seqs'], 'sequence')} and {tokens}"


def _title(fit: dict[str, Any]) -> str:
    return f"{fit['gpus']} x {fit['name']}" if fit["gpus"] > 1 else str(fit["name"])


def _gpu_table(fits: list[dict[str, Any]], *, is_split: bool) -> Table:
    """Render one line a GPU. "At once": how many sequences of the mean and of the longest length run, or both.

    is_split: workers have several GPUs, so that weights differ from line to line
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)  # 80 columns must do
    sizes = ["memory_bytes", *(["weights_bytes"] if is_split else []), "cache_bytes"]
    for header in ("GPU", "Memory", *(["Weights"] if is_split else []), "KV cache", "Tokens", "At once", "Fits"):
        table.add_column(header, justify="left" if header in ("GPU", "Fits") else "right", no_wrap=True)
    for fit in fits:
        found = fit["sequences"]
        at_once = " .. ".join(dict.fromkeys(str(found[name]) for name in ("of_mean", "of_longest"))) if found else ""
        no = "no" if fit["runs"] else "no kernel"
        fitting = Text("yes", "green") if fit["fits"] else Text(no, "red")
        table.add_row(_title(fit), *(memory(fit[name]) for name in sizes), f"{fit['cache_tokens']:,}", at_once, fitting)
    return table


def _time_lines(forecast: dict[str, Any]) -> Iterator[tuple[str, RenderableType]]:
    if forecast["tokens_per_s"] is None:
        yield "Time", "not known: nothing similar was measured; give --tokens-per-second"
        return
    workers = count(forecast["workers"], "worker")
    at_most = forecast["at_most"]
    known = at_most if forecast["seconds"] is None else forecast
    parts = [("at most " if forecast["seconds"] is None else "") + duration(known["seconds"])]
    if known["card_hours"] is not None:
        parts.append(f"{known['card_hours']:,.2f} GPU-hours")
    if known["price"] is not None:
        parts.append(f"{known['price']:,.2f} USD")
    yield "Time", f"{', '.join(parts)} with {workers}, {forecast['tokens_per_s']:,.0f} tokens/s, after startup"
    yield "", f"by {forecast['source']}"


def _done(plan: dict[str, Any], done: dict[str, int]) -> str:
    if plan["input"]["rows"] == 0:
        return "the input has no rows; the output will be one part without any"
    if done["shards"] == 0:
        return "nothing yet"
    failed = f" ({count(done['failed_rows'], 'row')} with an error)" if done["failed_rows"] else ""
    if done["shards"] == plan["shards"]:
        return f"all {count(done['rows'], 'row')}{failed}; a run would do nothing"
    return (
        f"{done['shards']} of {count(plan['shards'], 'shard')}, {done['rows']:,} of "
        f"{count(plan['input']['rows'], 'row')}{failed}; a run continues from there"
    )
