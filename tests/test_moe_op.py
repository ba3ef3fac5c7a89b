"""tv::moe against its formula in float64, and as the rest of PyTorch sees it; the text of a MoESpec."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings, strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.autograd.graph import saved_tensors_hooks

import tvcompile.kernels
from tests.harness import tolerated
from tvcompile import expr, syntax
from tvcompile.kernels import cpu_experts, cpu_products
from tvcompile.kernels.experts import Experts, Routing, moe_ref
from tvcompile.moe_spec import LAYOUTS, MoESpec
from tvcompile.tuning.cpu import ExpertConfig

T, K, E, H, F, H_OUT = 13, 2, 4, 16, 12, 10
OP = torch.ops.tv.moe.default
SILU = "act = u*(g*sigmoid(g)); layout=chunk"
ACTS = {
    "plain": "u*sigmoid(u)",
    "chunk": "u*(g*sigmoid(g))",
    "interleave": "(1.0 + clamp_max(u, 1.0))*g*sigmoid(1.7*g)",
}
NAMES = "x", "weights", "up", "down", "up_bias", "down_bias"


def spec_of(layout="chunk", weigh="output", out=""):
    return str(MoESpec(syntax.parse(ACTS.get(layout, ACTS["chunk"])), layout, weigh, out))


def arguments(layout="chunk", stacked=True, bias=True, dtype=torch.float64, tokens=T, top=K, ids=None):
    """x, ids, weights and the four lists; `up` and `down` are transposed views, as those of nn.Linear are."""
    sets, wide = (2 if layout == "separate" else 1), (F if layout in ("plain", "separate") else 2 * F)
    lead, copies = ((E,), 1) if stacked else ((), E)

    def leaves(count, *shape):
        return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(count)]

    def projections(count, rows, columns):
        return [t.detach().mT.requires_grad_() for t in leaves(count, *lead, columns, rows)]

    ups, downs = projections(sets * copies, H, wide), projections(copies, F, H_OUT)
    biases = (leaves(sets * copies, *lead, wide), leaves(copies, *lead, H_OUT)) if bias else ([], [])
    ids = torch.randint(-1, E, (tokens, top)) if ids is None else ids
    return leaves(1, tokens, H)[0], ids, leaves(1, *ids.shape)[0], ups, downs, *biases


def flat(arguments):
    """{name: leaf}"""
    x, _, weights, *lists = arguments
    named = {f"{n}{i}": t for n, ts in zip(NAMES[2:], lists) for i, t in enumerate(ts)}
    return {"x": x, "weights": weights, **named}


def run(call, args, spec, dtype=None):
    """{name: result or gradient} of a copy of the arguments in `dtype`."""
    x, ids, *rest = args

    def copied(t):
        return [copied(y) for y in t] if isinstance(t, list) else t.detach().to(dtype).requires_grad_()

    args = (copied(x), ids, *map(copied, rest))
    out = call(*args, spec)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    leaves = flat(args)
    grads = torch.autograd.grad(out, list(leaves.values()), direction, allow_unused=True)
    zeros = (torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), grads))
    return {"out": out.detach(), **dict(zip(leaves, zeros))}


def op(*args):
    return OP(*args, True)[0]


def eager(x, ids, weights, up, down, up_bias, down_bias, spec):
    """The where-loop of most models, in x's dtype."""
    spec = MoESpec.parse(spec)
    out = x.new_zeros(len(x), down[0].shape[-1])
    p = tvcompile.kernels.experts.Experts(spec, x, ids, weights, up, down, up_bias, down_bias)
    for e in range(p.count):
        token, k = torch.where(ids == e)
        w = weights[token, k, None]
        rows = x[token] * w if spec.weigh == "input" else x[token]
        pre = torch.cat([rows @ W for W in p.of_expert(up, e)], -1)
        pre = pre + torch.cat(p.of_expert(up_bias, e), -1) if up_bias else pre
        y = tvcompile.kernels.experts.activate(spec.act, p.split(pre)) @ p.of_expert(down, e)[0]
        y = y + p.of_expert(down_bias, e)[0] if down_bias else y
        out = out.index_add(0, token, y if spec.weigh == "input" else y * w)
    return out.to(p.out_dtype)


def check_exact(args, spec, call=op):
    got, want = (run(f, args, spec, torch.float64) for f in (call, moe_ref))
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m: f"{name}: {m}")


GRID = list(itertools.product(LAYOUTS, (True, False), (True, False), ("output", "input")))


@pytest.mark.parametrize("layout, stacked, bias, weigh", GRID)
def test_every_layout_is_its_formula(layout, stacked, bias, weigh):
    check_exact(arguments(layout, stacked, bias), spec_of(layout, weigh))


@pytest.mark.parametrize("layout, stacked, bias, weigh", GRID)
def test_opened_in_a_graph_it_is_its_formula(layout, stacked, bias, weigh):
    """What AOTAutograd makes of it, computed as it stands there."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    call = torch.compile(op, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    check_exact(arguments(layout, stacked, bias), spec_of(layout, weigh), call)
    assert "expert_products" in graphs[0].code and "tv.moe.default" not in graphs[0].code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout, stacked, bias, weigh", GRID[::3])
def test_it_is_as_precise_as_eager(layout, stacked, bias, weigh, dtype):
    draws = [arguments(layout, stacked, bias, dtype, tokens=200) for _ in range(4)]
    check_precise(draws, spec_of(layout, weigh), dtype)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout, stacked, bias, weigh", GRID[1::3])
def test_products_in_either_dtype(layout, stacked, bias, weigh, dtype, faster, contiguous, monkeypatch):
    """Whatever this machine is faster in: in x's dtype, or in float32 with few numbers widened at a time."""
    monkeypatch.setattr(cpu_products, "float32_is_faster", lambda _: faster)
    monkeypatch.setattr(cpu_products, "WIDE", 100)
    monkeypatch.setattr(cpu_products, "SMALL", 1000 * contiguous)
    x, ids, w, up, down, *biases = arguments(layout, stacked, bias, dtype, tokens=400)
    if contiguous:
        up, down = ([t.detach().contiguous().requires_grad_() for t in ts] for ts in (up, down))
    check_precise([(x, ids, w, up, down, *biases)], spec_of(layout, weigh), dtype)


@pytest.mark.parametrize("way", ["as they are", "widened", "widened without oneDNN", "small ones"])
@pytest.mark.parametrize("shape", [(200, 96, 40), (200, 40, 96), (7, 40, 96)], ids=str)
@pytest.mark.parametrize("order", ["io", "oi"])
def test_a_bias_is_added_before_the_product_is_rounded(shape, order, way, monkeypatch):
    """On which side of a bend a value lies must not depend on more than one rounding."""
    monkeypatch.setattr(cpu_products, "float32_is_faster", lambda _: way != "as they are")
    monkeypatch.setattr(cpu_products, "WIDE", 1000)
    monkeypatch.setattr(cpu_products, "SMALL", 1 << 18 if way == "small ones" else 0)
    if way == "widened without oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        monkeypatch.setattr(cpu_products, "product_dtype", lambda _: torch.float32)
    n, M, N = shape
    rows, bias, W = torch.randn(n, M).bfloat16(), 8 * torch.randn(N).bfloat16(), torch.randn(M, N).bfloat16()
    W = W if order == "io" else W.T.contiguous().T
    for out in (torch.empty(n, 2 * N, dtype=torch.bfloat16)[:, :N], torch.empty(N, n, dtype=torch.bfloat16).T):
        cpu_products.times(out, rows, W, bias)
        exact = rows.double() @ W.double() + bias.double()
        assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


@pytest.mark.parametrize("small", [0, 1 << 18], ids=["oneDNN", "torch.mm"])
def test_any_number_of_rows(small, monkeypatch):
    monkeypatch.setattr(cpu_products, "SMALL", small)
    W, bias = torch.randn(24, 40), torch.randn(40)
    for n in (1, 2, 31, 32, 33, 63, 65, 128, 129, 1000, 1023):
        rows, out = torch.randn(n, 24), torch.zeros(n + 1, 40)
        cpu_products.times(out[:n], rows, W, bias)
        assert torch.allclose(out[:n].double(), rows.double() @ W.double() + bias.double(), atol=1e-5)
        assert not out[n].any()


@pytest.mark.parametrize("layout, stacked, bias, weigh", GRID[::5])
def test_products_are_of_few_numbers_of_rows(layout, stacked, bias, weigh, monkeypatch):
    """oneDNN compiles a kernel for each, and an expert has another number of tokens in every call."""
    taken = set()

    def counted(real, dim):
        return lambda out, a, *rest: (taken.add(a.shape[dim]), real(out, a, *rest))

    for name, dim in (("times", 0), ("multiply", 1)):
        monkeypatch.setattr(cpu_experts, name, counted(getattr(cpu_experts, name), dim))
    for tokens in (40, 120, 333, 700):
        check_exact(arguments(layout, stacked, bias, tokens=tokens), spec_of(layout, weigh))
    assert len(taken) > 8 and taken == {cpu_products.round_up(n) for n in taken}


@pytest.mark.parametrize("tokens", [67, 131, 1030])
def test_no_rows_lie_behind_the_last(tokens):
    ids = torch.full((tokens, 1), 3)
    ids[: tokens // 2] = 1
    check_exact(arguments(ids=ids, tokens=len(ids)), SILU)


def test_rows_are_rounded_up_a_little():
    for n in range(1, 3000):
        more = cpu_products.round_up(n)
        assert n <= more <= n * 33 / 32 and more == cpu_products.round_up(more)
    assert len({cpu_products.round_up(n) for n in range(1, 1 << 12)}) < 300


def test_memory_first_used_in_inference_mode_serves_others(monkeypatch):
    monkeypatch.setattr(cpu_products, "float32_is_faster", lambda _: True)
    monkeypatch.setattr(cpu_products, "HELD", cpu_products.Held())
    args = arguments(dtype=torch.bfloat16, tokens=400)
    with torch.inference_mode():
        OP(*args, SILU, False)
    check_precise([args], SILU, torch.bfloat16)


def test_only_narrow_numbers_are_widened():
    """A machine may be faster in float32 than in float64."""
    assert not any(map(cpu_products.float32_is_faster, (torch.float32, torch.float64)))


def check_precise(draws, spec, dtype, call=op):
    """The largest error of a draw is partly chance: of several, that of all of them counts."""
    # Smooth: on which side of a bend a value lies is decided by its rounding.
    spec = spec.replace("clamp_max(u, 1.0)", "tanh(u)")

    def all_of(call, dtype):
        found = [run(call, args, spec, dtype) for args in draws]
        return {n: torch.cat([f[n] for f in found]) for n in found[0]}

    got, own, exact = all_of(call, dtype), all_of(eager, dtype), all_of(moe_ref, torch.float64)
    wrong = {n: w for n in got if (w := tolerated(got[n], own[n], exact[n]))}
    assert not wrong


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(T, 2).long(),
        torch.full((T, 2), -1),
        torch.full((T, 1), 3),
        torch.tensor([[2, -1, 2]] * T),
        torch.arange(T * 4).view(T, 4) % 4,
        torch.arange(T).view(T, 1).int() % 2,
    ],
    ids=["one twice", "none", "last", "the same twice", "all", "int32"],
)
def test_any_routing(ids):
    check_exact(arguments(ids=ids, tokens=len(ids)), SILU)


@pytest.mark.parametrize("tokens, top", [(0, 2), (3, 0), (0, 0)])
def test_nothing_to_do(tokens, top):
    args = arguments(tokens=tokens, top=top)
    found = run(op, args, SILU, torch.float64)
    assert found["out"].shape == (tokens, H_OUT)
    assert all(found[n].shape == t.shape for n, t in flat(args).items()) and not any(t.any() for t in found.values())


def test_a_dropped_pair_leaves_no_trace_of_its_weight():
    args = arguments(dtype=torch.float32, tokens=3, ids=torch.tensor([[0, -1], [-1, -1], [1, 2]]))
    with torch.no_grad():
        args[2][args[1] < 0] = torch.nan
    for name, t in run(op, args, SILU, torch.float32).items():
        assert t.isfinite().all(), name


def test_batches_of_experts_do_not_change_the_result(monkeypatch):
    args, made = arguments(tokens=40), Experts.of
    for batch, chunk in ((1, 1), (F * 30, F * 7), (1 << 21, 1 << 18)):
        config = ExpertConfig(batch, chunk)
        monkeypatch.setattr(Experts, "of", staticmethod(lambda *a: dataclasses.replace(made(*a), config=config)))
        check_exact(args, SILU)


def test_without_saved_activations_they_are_computed_again():
    check_exact(arguments(), SILU, call=lambda *args: OP(*args, False)[0])


@pytest.mark.parametrize("layout", ["chunk", "separate"])
@pytest.mark.parametrize("weigh", ["output", "input"])
@pytest.mark.parametrize("frozen", [*itertools.combinations(("x", "weights", "projections", "bias"), 2), ("x",), ()])
def test_only_what_is_wanted_is_given(layout, weigh, frozen):
    args, spec = arguments(layout), spec_of(layout, weigh)
    groups = {"projections": ("up0", "up1", "down0"), "bias": ("up_bias0", "up_bias1", "down_bias0")}
    names = {n for f in frozen for n in groups.get(f, (f,))}
    leaves = {n: t.requires_grad_(n not in names) for n, t in flat(args).items()}
    free = {n: t for n, t in leaves.items() if t.requires_grad}
    got, want = (torch.autograd.grad(f(*args, spec).sum(), list(free.values())) for f in (op, moe_ref))
    torch.testing.assert_close(got, want)


def test_a_result_of_another_dtype():
    args, spec = arguments(dtype=torch.bfloat16), spec_of(out="float32")
    out = op(*args, spec)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, moe_ref(*args, spec), rtol=2e-2, atol=2e-2 * float(out.detach().abs().max()))


@pytest.mark.parametrize("layout, stacked", [("chunk", True), ("separate", False), ("interleave", True)])
def test_the_registration_passes_opcheck(layout, stacked):
    torch.library.opcheck(OP, (*arguments(layout, stacked, dtype=torch.float32), spec_of(layout), True))


@pytest.mark.parametrize("layout, stacked", [("chunk", True), ("separate", False), ("separate", True)])
def test_the_products_pass_opcheck(layout, stacked):
    args = arguments(layout, stacked, dtype=torch.float32)
    x, ids, _, up, _, bias, _ = ([t.detach() for t in a] if isinstance(a, list) else a.detach() for a in args)
    routing, products = Routing.of(ids, E), torch.ops.tv.expert_products.default
    tokens = routing.order // K
    torch.library.opcheck(products, (x, tokens, routing.offsets, E, up, bias))
    torch.library.opcheck(products, (x[tokens], None, routing.offsets, E, up, []))


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_pairs_without_an_expert_read_no_memory_that_was_not_written(codegen):
    args = [[t.detach() for t in a] if isinstance(a, list) else a.detach() for a in arguments(dtype=torch.float32)]
    assert bool((args[1] < 0).any())
    call = torch.compile(lambda *a: OP(*a, SILU, False)[0], backend=codegen)
    expected = moe_ref(*args, SILU)
    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    try:
        assert torch.empty(3).isnan().all()
        torch.testing.assert_close(call(*args), expected, rtol=1e-4, atol=1e-4)
    finally:
        torch.use_deterministic_algorithms(False)


def test_opcheck_of_inference():
    args = [[t.detach() for t in a] if isinstance(a, list) else a.detach() for a in arguments(dtype=torch.float32)]
    torch.library.opcheck(OP, (*args, SILU, False))


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("stacked", [True, False])
def test_real_and_fake_gradients_lie_alike_in_memory(stacked, turned):
    mode = torch._subclasses.FakeTensorMode()
    x, *args = arguments("separate", stacked, dtype=torch.float32)
    args = [x.mT.contiguous().mT if turned else x, *args]
    args = [[t.detach() for t in a] if isinstance(a, list) else a.detach() for a in args]
    fake = [[mode.from_tensor(t) for t in a] if isinstance(a, list) else mode.from_tensor(a) for a in args]
    found = []
    for a in (args, fake):
        out, hidden = OP(*a, spec_of("separate"), True)
        dx, dw, *lists = torch.ops.tv.moe_backward(out, *a, spec_of("separate"), hidden, [True] * 4)
        found.append([(t.shape, t.stride(), t.dtype) for t in (out, hidden, dx, dw, *sum(lists, []))])
    assert found[0] == found[1]


def test_it_survives_inductor_in_training_with_any_number_of_tokens():
    def program(x, router, up, down):
        weights, ids = (x @ router).softmax(-1).topk(2)
        out = OP(x * 2, ids, weights, [up.mT], [down.mT], [], [], SILU, True)[0]
        return out.sin()

    compiled = torch.compile(program, fullgraph=True, dynamic=True)
    shapes = (H, E), (E, 2 * F, H), (E, H_OUT, F)
    parameters = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    for tokens in (5, 8, 21):
        leaves = [torch.randn(tokens, H, dtype=torch.float64, requires_grad=True), *parameters]
        got, want = compiled(*leaves), program(*leaves)
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(out, leaves, torch.ones_like(want)) for out in (got, want))
        torch.testing.assert_close(*map(list, grads))


def test_what_is_saved_for_backward_is_the_arguments_and_what_is_activated():
    args, saved = arguments(dtype=torch.bfloat16, tokens=64), {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        op(*args, SILU)
    given = {t.untyped_storage().data_ptr() for t in (*flat(args).values(), args[1])}
    assert sum(size for place, size in saved.items() if place not in given) == 64 * K * 2 * F * 2


# Errors


@pytest.mark.parametrize(
    "change, message",
    [
        ({3: lambda ups: [ups[0][:, 1:]]}, r"expected 1 tensors \[4, 16, 24\] as up"),
        ({3: lambda ups: ups * 2}, "expected 1 tensors"),
        ({4: lambda downs: [downs[0].float()]}, "x is torch.float64, down"),
        ({5: lambda biases: [biases[0][:, 1:]]}, "as up_bias"),
        ({0: lambda x: x[1:]}, r"needs x \[T,H\], ids and weights \[T,K\]"),
        ({1: lambda ids: ids.double()}, "integer ids"),
    ],
)
def test_what_does_not_fit_is_told(change, message):
    mode = torch._subclasses.FakeTensorMode()
    args = list(arguments())
    for at, edit in change.items():
        args[at] = edit(args[at])
    fake = [[mode.from_tensor(t) for t in a] if isinstance(a, list) else mode.from_tensor(a) for a in args]
    with pytest.raises(ValueError, match=message):
        OP(*fake, SILU, True)


# The text of a Spec


@st.composite
def specs(draw):
    layout = draw(st.sampled_from(list(LAYOUTS)))
    names = st.just(expr.UP) if layout == "plain" else st.sampled_from([expr.UP, expr.GATE])
    numbers = st.floats(-8, 8, width=32).map(expr.number)
    unary, binary = st.sampled_from(["sigmoid", "tanh", "erf", "neg"]), st.sampled_from(["add", "mul", "clamp_max"])
    acts = st.recursive(
        names,
        lambda inner: st.one_of(
            st.builds(lambda f, a: expr.apply(f, a), unary, inner),
            st.builds(lambda f, a, b: expr.apply(f, a, b), binary, inner, st.one_of(inner, numbers)),
        ),
        max_leaves=6,
    )
    weigh, out = draw(st.sampled_from(["output", "input"])), draw(st.sampled_from(["", "float32", "bfloat16"]))
    return MoESpec(draw(acts), layout, weigh, out)


@settings(max_examples=150, deadline=None)
@given(specs())
def test_a_spec_is_its_text(spec):
    assert MoESpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text, message",
    [
        ("act = u; weight=input", "'weight=input' is not a clause"),
        ("act = u; layout=rows", "layout must be one of plain, chunk"),
        ("act = u; weigh=both", "weigh must be output or input; got 'both'"),
        ("act = u; out=int8", "out must be one of float16"),
        ("act = g*u", r"act holds \['g'\], which layout 'plain' does not have"),
        ("u", "'u' is not a clause"),
    ],
)
def test_a_wrong_text_is_told(text, message):
    with pytest.raises(ValueError, match=message):
        MoESpec.parse(text)
