"""Check every kernel at the shapes of the real models against its reference, and its rows alone against a batch.

Errors are ||out - reference|| / ||reference||; NaN passes no check. Memory that a kernel does not write is NaN.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.cases import normal
from gpu.cases_attention import Attention
from gpu.cases_dense import Dense
from gpu.cases_experts import TOP_K, Experts, shapes
from gpu.cases_quantized import Quantized, cases, random_packed
from gpu.setup import NO_TIME, Row, Setup
from moray.kernels.activation import SWIGLU
from moray.kernels.gpu.allowed import keep_allowed, keep_allowed_ref
from moray.kernels.gpu.combine import combine, combine_ref
from moray.kernels.gpu.experts_down import experts_down, experts_down_ref
from moray.kernels.gpu.experts_up import experts_up, experts_up_ref
from moray.kernels.gpu.grouped_gemm import case_label
from moray.kernels.gpu.linear import linear, linear_ref
from moray.kernels.gpu.norms import add_layer_norm, add_layer_norm_ref, add_rms_norm, add_rms_norm_ref
from moray.kernels.gpu.packed_weight import Sizes
from moray.kernels.gpu.paged_attention import paged_attention, paged_attention_ref
from moray.kernels.gpu.penalties import penalize, penalize_ref
from moray.kernels.gpu.quantize_rows import quantize_rows, quantize_rows_ref
from moray.kernels.gpu.rope_kv import rope_kv, rope_kv_ref
from moray.kernels.gpu.route import route_ref
from moray.kernels.gpu.sampling import sample, sample_ref
from moray.kernels.gpu.tuning import device as gpu

LIMIT = 1e-2  # error by rounding bf16 operands and results
Check = tuple[str, Callable[[], float], float]  # name, function that returns the error, limit of the error


def run(setup: Setup) -> Iterator[Row]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        for checks in (_dense, _experts, _quantized, _attention, _sampling):
            yield from run_checks(setup, checks(setup))
    finally:
        torch.use_deterministic_algorithms(False)


def run_checks(setup: Setup, checks: Iterable[Check]) -> Iterator[Row]:
    """Run the checks that no earlier call has finished, as long as there is time."""
    for name, check, limit in checks:
        if setup.find(check=name) is None:
            has_time = setup.is_dry or setup.seconds_left > 0
            yield checked(name, check, limit) if has_time else {"check": name, "ok": None, "error": NO_TIME}


def checked(name: str, check: Callable[[], float], limit: float) -> Row:
    """Run a check; return a row with the error and whether it is within the limit, or with what the check raised."""
    try:
        error = check()
        return {"check": name, "error": error, "limit": limit, "ok": bool(error <= limit)}
    except Exception as raised:
        return {"check": name, "ok": False, "raised": f"{type(raised).__name__}: {str(raised)[:500]}"}


def distance(out: Tensor, reference: Tensor) -> float:
    """Return ||out - reference|| / ||reference||."""
    a, b = out.double().cpu(), reference.double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def differing(a: Tensor, b: Tensor) -> float:
    """Return the share of rows that are not bitwise equal."""
    return float((a != b).flatten(1).any(1).float().mean()) if len(a) else 0.0


def alone_and_together(run_rows: Callable[[Tensor], Tensor], count: int, device: torch.device) -> float:
    """Return the largest share of rows that change when they run alone, in small groups, or in another order.

    run_rows: returns the results of the rows with the given numbers
    """
    everything = torch.arange(count, device=device)
    together = run_rows(everything)
    order = torch.randperm(count, device=device)
    worst = differing(run_rows(order), together[order])
    for size in (1, 7, 64, 300):
        part = everything[-size:]
        worst = max(worst, differing(run_rows(part), together[part]))
    return worst


def _dense(setup: Setup) -> Iterator[Check]:
    dense = Dense(setup.device, is_dry=setup.is_dry)
    many = 30 if setup.is_dry else 700
    new = partial(normal, dtype=torch.bfloat16, device=setup.device)
    wide = dense.heads * dense.head_dim
    sizes = {"qkv_proj": dense.qkv, "o_proj": wide, "router": dense.num_experts, "lm_head": dense.vocab}
    for name, n in sizes.items():
        weight, bias, x = new(n, dense.hidden, std=dense.hidden**-0.5), new(n), new(many, dense.hidden)
        for rows in (1, 17, many):
            yield (
                f"linear {name}, {rows} rows",
                partial(_error, linear, linear_ref, x[:rows].contiguous(), weight, bias),
                LIMIT,
            )
        if not setup.is_dry:  # the interpreter's sums depend on a row's place
            yield f"linear {name}: rows do not depend on others", partial(_linear_alone, x, weight, bias), 0
    x, residual, weight, bias = new(many, dense.hidden), new(many, dense.hidden), new(dense.hidden), new(dense.hidden)
    yield "add_layer_norm", partial(_error, add_layer_norm, add_layer_norm_ref, x, residual, weight, bias, 1e-5), LIMIT
    yield "add_rms_norm", partial(_error, add_rms_norm, add_rms_norm_ref, x, residual, weight, 1e-5), LIMIT
    of_slots = new(TOP_K * many, dense.hidden)
    yield "combine", partial(_error, combine, combine_ref, of_slots, residual, weight, bias, 1e-5, TOP_K), LIMIT
    yield "rope_kv", partial(_rope, dense), LIMIT


def _error(op: Callable[..., Any], reference: Callable[..., Any], *arguments: object) -> float:
    """Return the error of the operation's result, or of the last of its results."""
    out, wanted = op(*arguments), reference(*arguments)
    return distance(out, wanted) if isinstance(out, Tensor) else distance(out[-1], wanted[-1])


def _linear_alone(x: Tensor, weight: Tensor, bias: Tensor) -> float:
    return alone_and_together(lambda which: linear(x[which], weight, bias), len(x), x.device)


def _rope(dense: Dense) -> float:
    rows, results = 50, []
    for op in (rope_kv, rope_kv_ref):
        torch.manual_seed(1)
        (call, *_) = dense.rope(rows).ours
        assert isinstance(call, partial)
        results.append((op(*call.args), *call.args[3:5]))
    return max(distance(ours, theirs) for ours, theirs in zip(*results, strict=True))


def _experts(setup: Setup) -> Iterator[Check]:
    for shape in shapes(setup.is_dry):
        experts = Experts(shape, setup.device)
        many = 30 if setup.is_dry else 2000
        for rows in (1, many, *(() if setup.is_dry else (37, 300))):
            yield f"route {shape.name}, {rows} rows", partial(_route, experts, rows), 0
        for rows in (1, 20) if setup.is_dry else (1, 37, 300):
            yield f"experts {shape.name}, {rows} rows", partial(_up_and_down, experts, rows), LIMIT
        if not setup.is_dry:
            yield f"expert layer {shape.name}: rows do not depend on others", partial(_layer, experts, many), 0


def _route(experts: Experts, rows: int) -> float:
    """Return which share of the four results of routing differs from the reference."""
    logits = experts.logits(rows)[0]
    got = experts.routed(logits, 16)
    method = "sparsemixer" if experts.shape.name.startswith("phi-3") else "softmax"
    want = route_ref(logits, method=method, top_k=TOP_K, jitter=0.01, block_m=16)  # type: ignore[arg-type]
    same = [torch.equal(getattr(got, f), getattr(want, f)) for f in ("topk_ids", "sorted_rows", "tile_experts")]
    close = torch.allclose(got.topk_weights, want.topk_weights, atol=1e-5)
    return 1.0 - (sum(same) + close) / 4


def _up_and_down(experts: Experts, rows: int) -> float:
    layer, shape = experts.layer, experts.shape
    x, (logits, *_) = experts.inputs(rows), experts.logits(rows)
    routing = experts.routed(logits, experts.tile("experts_up", rows).block_m)
    is_real = routing.sorted_rows < routing.topk_ids.numel()
    hidden = experts_up(x, layer.up, routing, layer.up_bias, shape.activation)
    wanted = experts_up_ref(x, layer.up, routing, layer.up_bias, shape.activation)
    error = distance(hidden[is_real], wanted[is_real])
    out = experts_down(hidden, layer.down, routing, layer.down_bias)
    return max(error, distance(out, experts_down_ref(hidden, layer.down, routing, layer.down_bias)))


def _layer(experts: Experts, rows: int) -> float:
    x, residual, (logits, *_) = experts.inputs(rows), experts.inputs(rows), experts.logits(rows)
    return alone_and_together(
        lambda which: experts.run(x[which], residual[which], logits[which])[1], rows, experts.device
    )


def _quantized(setup: Setup) -> Iterator[Check]:
    for case in cases(is_dry=setup.is_dry):
        quantized = Quantized(case, setup.device, is_dry=setup.is_dry)
        label, many = case_label(case), 20 if setup.is_dry else 300
        for rows in (1, many):
            yield f"experts{label}, {rows} rows", partial(_quantized_experts, quantized, rows), LIMIT
            yield f"linear{label}, {rows} rows", partial(_quantized_linear, quantized, rows), LIMIT
        if not setup.is_dry:
            yield f"experts{label}: rows do not depend on others", partial(_quantized_alone, quantized, 2000), 0
    if not setup.is_dry and gpu().capability >= (8, 9):
        yield "quantize_rows", partial(_quantize_rows, setup.device), 0


def _quantized_experts(quantized: Quantized, rows: int) -> float:
    dense, up, down = quantized.dense, quantized.up_weight, quantized.down_weight
    x, (logits, *_) = dense.inputs(rows), dense.logits(rows)
    routing = dense.routed(logits, quantized.block_m(rows))
    is_real = routing.sorted_rows < routing.topk_ids.numel()
    hidden, wanted = (op(x, up, routing, None, SWIGLU) for op in (experts_up, experts_up_ref))
    out = experts_down(hidden, down, routing, None)
    error = distance(out, experts_down_ref(hidden, down, routing, None))
    return max(error, distance(hidden[is_real], wanted[is_real]))


def _quantized_linear(quantized: Quantized, rows: int) -> float:
    n, k = quantized.qkv
    weight = random_packed(quantized.case, Sizes(1, n, k), quantized.device)
    x, bias = (normal(*shape, dtype=torch.bfloat16, device=quantized.device) for shape in ((rows, k), (n,)))
    return distance(linear(x, weight, bias), linear_ref(x, weight, bias))


def _quantized_alone(quantized: Quantized, rows: int) -> float:
    dense = quantized.dense
    x, (logits, *_) = dense.inputs(rows), dense.logits(rows)

    def run(which: Tensor) -> Tensor:
        routing = dense.routed(logits[which], quantized.block_m(len(which)))
        hidden = experts_up(x[which], quantized.up_weight, routing, None, SWIGLU)
        return experts_down(hidden, quantized.down_weight, routing, None).view(len(which), -1)

    return alone_and_together(run, rows, quantized.device)


def _quantize_rows(device: torch.device) -> float:
    """Return the share of codes that differ."""
    x = normal(500, 4096, dtype=torch.bfloat16, device=device)
    (codes, _), (wanted, _) = quantize_rows(x), quantize_rows_ref(x)
    return float((codes.view(torch.uint8) != wanted.view(torch.uint8)).double().mean())


def _attention(setup: Setup) -> Iterator[Check]:
    attention = Attention(setup.device, is_dry=setup.is_dry)
    spans = [(9, 10), (0, 5), (38, 40)] if setup.is_dry else [(1999, 2000), (300, 812), (0, 70), (255, 257), (640, 641)]
    yield "attention, decode and prefill", partial(_attend, attention, spans), LIMIT
    yield "attention: queries do not depend on others", partial(_attend_alone, attention, spans), 0


def _attend(attention: Attention, spans: list[tuple[int, int]]) -> float:
    arguments = _step(attention, spans)
    return distance(paged_attention(*arguments), paged_attention_ref(*arguments))


def _attend_alone(attention: Attention, spans: list[tuple[int, int]]) -> float:
    """Compare each sequence alone, in chunks of 64 tokens, with all together."""
    q, k_cache, v_cache, tables, starts, lens, scale = _step(attention, spans)
    together, worst = paged_attention(q, k_cache, v_cache, tables, starts, lens, scale), 0.0
    for i, (first, stop) in enumerate(spans):
        begin = int(starts[i])
        for at in range(first, stop, 64):
            count = min(64, stop - at)
            rows = slice(begin + at - first, begin + at - first + count)
            own = starts.new_tensor([0, count]), lens.new_tensor([at + count])
            alone = paged_attention(q[rows].contiguous(), k_cache, v_cache, tables[i : i + 1], *own, scale)
            worst = max(worst, differing(alone, together[rows]))
    return worst


def _step(
    attention: Attention, spans: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """Return the arguments of paged_attention for the tokens first..stop of each sequence."""
    lengths = torch.tensor([0, *(stop - first for first, stop in spans)], device=attention.device)
    ends = [stop for _, stop in spans]
    k_cache, v_cache, tables = attention.caches(len(spans), max(ends))
    q = attention.new(int(lengths.sum()), attention.heads, attention.head_dim)
    lens = torch.tensor(ends, dtype=torch.int32, device=attention.device)
    return q, k_cache, v_cache, tables, lengths.cumsum(0).int(), lens, attention.head_dim**-0.5


def _sampling(setup: Setup) -> Iterator[Check]:
    vocab = 160 if setup.is_dry else 32064
    # exp's last bit may fall otherwise than the reference's, and with it, rarely, a token.
    yield "sample: share of tokens that differ", partial(_sample, vocab, setup.device), 0.02
    yield "penalize", partial(_penalize, vocab, setup.device), 1e-6
    yield "keep allowed: share of logits that differ", partial(_keep_allowed, vocab, setup.device), 0.0


def _sample(vocab: int, device: torch.device) -> float:
    rows = 100
    logits = normal(rows, vocab, dtype=torch.bfloat16, device=device, std=3.0)
    pick = torch.arange(rows, device=device)
    arguments = (
        logits,
        (pick % 3 * 0.5).float(),
        (pick % 5 * 20).int(),
        torch.where(pick % 4 == 0, 1.0, 0.9).double(),
        torch.where(pick % 7 == 0, 0.01, 0.0).double(),
        pick * 7919,
        (pick % 2).int(),
        pick + 3,
    )
    return float((sample(*arguments) != sample_ref(*arguments)).double().mean())


def _keep_allowed(vocab: int, device: torch.device) -> float:
    logits = torch.randn(20, vocab, device=device)
    masks = torch.randint(-(2**31), 2**31, (10, -(-vocab // 32)), device=device).int()
    rows = torch.arange(19, -1, -2, device=device, dtype=torch.int32)
    ours, theirs = logits.clone(), logits.clone()
    keep_allowed(ours, masks, rows)
    keep_allowed_ref(theirs, masks, rows)
    return float((ours != theirs).double().mean())


def _penalize(vocab: int, device: torch.device) -> float:
    rows = 20
    logits = torch.randn(rows, vocab, device=device)
    seen = torch.randint(-20, 3, (rows, vocab), device=device, dtype=torch.int32).clamp_(min=0)
    slots = torch.arange(rows, device=device, dtype=torch.int32)
    amounts = [torch.full((rows,), value, device=device) for value in (1.1, 0.2, 0.1)]
    ours, theirs = logits.clone(), logits.clone()
    penalize(ours, seen, slots, *amounts)
    penalize_ref(theirs, seen, slots, *amounts)
    return distance(ours, theirs)
