"""Measure what structured output costs: rows that obey a JSON schema beside the same rows without it, on the CPU.

    python benchmarks/bench_structured.py [--requests 64] [--rounds 3] [--quick]

Three ways of the same engine alternate in each round: "structured"; "token by token", which also samples the tokens
that the grammar forces; and "free", the same prompts without a schema and with as many tokens each. The answers of the
first two must be the same. The rows use five schemas in turns. The model is bench_model.py's, with a byte-level
tokenizer of 32,000 tokens that is trained on Python's standard library, once.

After that, the time to the first token of one short prompt in an idle engine: with a schema that was never seen
("cold"), with one that is compiled ("warm"), and without ("free"), in turns.
"""

import argparse
import json
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import report
from bench_model import VOCAB, write_checkpoint
from rich.console import Console
from rich.table import Table

from moray.engine.config import EngineConfig
from moray.engine.engine import Engine
from moray.engine.params import SamplingParams
from moray.engine.platform.cpus import available_cores
from moray.engine.request import Request
from moray.engine.sampling.logit_processors import Allowed
from moray.engine.structured.constraint import Structured
from moray.engine.text.grammar import Matcher

KV_CACHE_BYTES = 128 << 20  # 16,384 tokens
EOS = 32000  # of the model's config.json
MAX_TOKENS = 128
TTFT_TRIES = 15
WAYS = ("structured", "token by token", "free")
PARTS = ("fill", "apply", "accept", "forced_tokens")  # of the grammar's work

TEXT = {"type": "string", "maxLength": 24}
DATE = {"type": "string", "format": "date"}
ITEM = {
    "type": "object",
    "properties": {"product": TEXT, "quantity": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["product", "quantity"],
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "label": {
        "label": {"enum": ["positive", "negative", "neutral"]},
        "confidence": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "person": {
        "name": TEXT,
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"anyOf": [TEXT, {"type": "null"}]},
    },
    "order": {
        "order_number": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{6}$"},
        "items": {"type": "array", "items": ITEM, "minItems": 1, "maxItems": 2},
        "is_paid": {"type": "boolean"},
    },
    "answer": {"reason": {"type": "string", "maxLength": 60}, "answer": {"enum": ["yes", "no"]}},
    "date": {"event": TEXT, "begins": DATE, "ends": DATE},
}

console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, nothing saved")
    args = parser.parse_args()
    num_rounds = 1 if args.quick else args.rounds
    config = EngineConfig(
        num_threads=available_cores(), kv_cache_memory=KV_CACHE_BYTES, max_num_seqs=args.requests, max_model_len=1024
    )
    engine = Engine(str(add_trained_tokenizer(write_checkpoint())), config)
    started = time.perf_counter()
    engine.compile(schema_of("label"))
    first_compile_s = time.perf_counter() - started
    run(engine, "structured", make_rows(args.requests, -1), [8] * args.requests)  # warm-up
    rounds = [race(engine, make_rows(args.requests, n), n) for n in range(num_rounds)]
    show(args.requests, rounds)
    first_tokens = measure_first_tokens(engine)
    console.print(
        f"first schema of the process, with the tokenizer: {first_compile_s:.2f} s; time to the first token, median of "
        f"{TTFT_TRIES}: " + ", ".join(f"{way} {figures['median_ms']} ms" for way, figures in first_tokens.items())
    )
    if args.quick:
        return
    result = report.context("torch", "llguidance") | {
        "requests": args.requests,
        "rounds": rounds,
        "first_compile_s": round(first_compile_s, 3),
        "time_to_first_token": first_tokens,
    }
    console.print(f"Saved {report.save('bench_structured', 'cpu', result).relative_to(report.ROOT)}")


def add_trained_tokenizer(checkpoint: Path) -> Path:
    """Return a folder of the same weights with a byte-level tokenizer whose end of text is the model's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = checkpoint.with_name(checkpoint.name + "-trained-tokenizer")
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).exists():
                (folder / name).symlink_to(checkpoint / name)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=EOS, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
        )
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
        texts = (path.read_text(errors="replace") for path in sources if "site-packages" not in path.parts)
        tokenizer.train_from_iterator(texts, trainer)
        missing = EOS - tokenizer.get_vocab_size()
        tokenizer.add_tokens([f"<unused{i}>" for i in range(missing)])
        tokenizer.add_special_tokens(["<|endoftext|>"])
        (folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}\n'
        )
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def schema_of(name: str, **more: Any) -> Structured:
    properties = SCHEMAS[name]
    return Structured.from_value(
        "json_schema", {"type": "object", "properties": properties, "required": list(properties), **more}
    )


def make_rows(number: int, round_id: int) -> list[tuple[list[int], Structured]]:
    """Make prompts of 16..128 tokens, each with a schema; the prompts' tokens differ from round to round."""
    lengths, tokens = random.Random(0), random.Random(1000 + round_id)
    names = list(SCHEMAS)
    return [
        (tokens.choices(range(300, EOS), k=lengths.randint(16, 128)), schema_of(names[i % len(names)]))
        for i in range(number)
    ]


def race(engine: Engine, rows: list[tuple[list[int], Structured]], round_id: int) -> dict[str, dict[str, Any]]:
    """Run the rows in each way, and return the figures of each."""
    structured = run(engine, "structured", rows, [MAX_TOKENS] * len(rows))
    lengths = [len(tokens) for tokens in structured["tokens"]]
    others = ["token by token", "free"] if round_id % 2 == 0 else ["free", "token by token"]
    figures = {"structured": structured} | {
        way: run(engine, way, rows, lengths if way == "free" else [MAX_TOKENS] * len(rows)) for way in others
    }
    answers = {way: figures[way].pop("tokens") for way in WAYS}
    assert answers["structured"] == answers["token by token"], "forced tokens changed an answer"
    assert [len(tokens) for tokens in answers["free"]] == lengths
    return figures


def run(engine: Engine, way: str, rows: list[tuple[list[int], Structured]], max_tokens: list[int]) -> dict[str, Any]:
    """Run the rows at once, and return the seconds, the steps, the tokens, and the shares of the grammar's work."""
    engine.reset_prefix_cache()
    engine._jumps = way == "structured"
    is_free = way == "free"
    for i, ((prompt, structured), limit) in enumerate(zip(rows, max_tokens, strict=True)):
        params = SamplingParams(
            max_tokens=limit, temperature=0.8, ignore_eos=is_free, structured=None if is_free else structured
        )
        engine.add(Request(str(i), prompt, params, i))
    before, tokens = engine.metrics.steps, [[] for _ in rows]  # type: tuple[int, list[list[int]]]
    num_outputs = 0
    with clocks() as spent:
        started, cpu_before = time.perf_counter(), time.process_time()
        while engine.has_work:
            for output in engine.step():
                tokens[int(output.request_id)] += output.new_token_ids
                num_outputs += 1
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_before
    number = sum(map(len, tokens))
    spent["apply"] -= spent["fill"]
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_s, 2),
        "tokens": tokens,
        "num_tokens": number,
        "tokens_per_s": round(number / seconds, 1),
        "tokens_per_cpu_s": round(number / cpu_s, 1),
        "steps": engine.metrics.steps - before,
        "outputs": num_outputs,
        "shares": {name: round(value / seconds, 4) for name, value in spent.items()},
    }


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Measure the seconds in the parts of the grammar's work. "apply" includes "fill"."""
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            spent[name] += time.perf_counter() - started
            return result

        return call

    owners = {"fill": Matcher, "apply": Allowed, "accept": Matcher, "forced_tokens": Matcher}
    plain = {name: getattr(owner, name) for name, owner in owners.items()}
    for name, owner in owners.items():
        setattr(owner, name, timed(name, plain[name]))
    try:
        yield spent
    finally:
        for name, owner in owners.items():
            setattr(owner, name, plain[name])


def over_free(rounds: list[dict[str, dict[str, Any]]], way: str, key: str) -> float:
    return float(statistics.median(figures[way][key] / figures["free"][key] for figures in rounds))


def show(number: int, rounds: list[dict[str, dict[str, Any]]]) -> None:
    """Print the figures of all rounds; a ratio is the median of those of the rounds."""
    table = Table(title=f"{number} requests, {rounds[0]['free']['num_tokens']:,} tokens", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("tokens/s", "of free", "by CPU", "steps", "outputs", "grammar"):
        table.add_column(column, justify="right")
    for way in WAYS:
        own = [figures[way] for figures in rounds]
        table.add_row(
            way,
            f"{statistics.median(one['tokens_per_s'] for one in own):.1f}",
            *(f"{over_free(rounds, way, key):.2f}x" for key in ("tokens_per_s", "tokens_per_cpu_s")),
            str(own[0]["steps"]),
            str(own[0]["outputs"]),
            f"{statistics.median(sum(one['shares'].values()) for one in own):.1%}",
        )
    console.print(table)
    for way in WAYS[:2]:
        each = {name: statistics.median(figures[way]["shares"][name] for figures in rounds) for name in PARTS}
        console.print(f"{way}: " + ", ".join(f"{name} {share:.2%}" for name, share in each.items()))


def measure_first_tokens(engine: Engine) -> dict[str, dict[str, float]]:
    """Return the milliseconds to the first token of a prompt of 32 tokens in each way."""
    engine._jumps = True
    source = random.Random(7)
    times: dict[str, list[float]] = {"cold": [], "warm": [], "free": []}
    for i in range(TTFT_TRIES):
        cold = schema_of("order", title=f"never seen {i} {json.dumps(source.random())}")
        for way, structured in (("cold", cold), ("warm", cold), ("free", None)):
            prompt = source.choices(range(300, EOS), k=32)
            params = SamplingParams(max_tokens=1, ignore_eos=structured is None, structured=structured)
            started = time.perf_counter()
            if structured is not None:
                engine.compile(structured)
            engine.add(Request("r", prompt, params))
            while engine.has_work:
                engine.step()
            times[way].append(1e3 * (time.perf_counter() - started))
    return {
        way: {"median_ms": round(statistics.median(each), 2), "max_ms": round(max(each), 2)}
        for way, each in times.items()
    }


assert EOS < VOCAB

if __name__ == "__main__":
    main()
