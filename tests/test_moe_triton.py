"""The Triton kernels of tv::moe against the formula in float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.harness import tolerated
from tvcompile.kernels.experts import ExpertNeed, Experts, Routing, Wanted, moe_ref
from tvcompile.moe_spec import MoESpec

pytest.importorskip("triton", reason="no Triton beside this PyTorch")

from tvcompile.arch import Device
from tvcompile.kernels import moe_triton
from tvcompile.kernels.routing import Schedule
from tvcompile.tuning.moe import Config, formula, row_block

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SILU = "act = g*sigmoid(g)*u"
GPT_OSS = "act = min(g, 7.0)*sigmoid(1.702*min(g, 7.0))*(min(max(u, -7.0), 7.0) + 1.0)"
SPECS = {
    "plain": "act = max(u, 0.0)*u",
    "chunk": f"{SILU}; layout=chunk",
    "interleave": f"{GPT_OSS}; layout=interleave",
    "separate": "act = 0.5*g*(1.0 + erf(g*0.7071))*u; layout=separate",
}
NAMES = ("x", "weights", "up", "down", "up_bias", "down_bias")


def small(pass_: str) -> Config:
    return Config(32 if pass_ == "dw" else 16, 32, 32, 4, 2)


def described(pass_: str) -> Config:
    return Config(32 if pass_ == "dw" else 16, 32, 32, 4, 2, descriptors=True, specialize=pass_ != "dx")


def halved(pass_: str) -> Config:
    return Config(32 if pass_ == "dw" else 16, 32, 32, 4, 2, halved=pass_ != "dw")


def arguments(spec, T=12, K=2, E=4, H=40, F=24, H_out=56, stacked=True, biases=True, transposed=False, ids=None):
    """(the float tensors of a call by name, ids), in float64 but of values that float16 has."""
    gen = torch.Generator().manual_seed(5)
    p = MoESpec.parse(spec)

    def made(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=gen, dtype=torch.float64) * scale).half().double().to(DEVICE)

    def weight(a: int, b: int) -> list[torch.Tensor]:
        w = made(E, b, a, scale=a**-0.5).mT if transposed else made(E, a, b, scale=a**-0.5)
        return [w] if stacked else [x.clone(memory_format=torch.preserve_format) for x in w]

    def bias(n: int) -> list[torch.Tensor]:
        return ([made(E, n)] if stacked else list(made(E, n))) if biases else []

    two = p.layout == "separate"
    ups = [*weight(H, F), *weight(H, F)] if two else weight(H, p.parts * F)
    up_bias = [*bias(F), *bias(F)] if two else bias(p.parts * F)
    if ids is None:
        ids = torch.stack([torch.randperm(E, generator=gen)[:K] for _ in range(T)])
    weights = torch.rand(T, K, generator=gen).half().double().to(DEVICE)
    return [made(T, H), weights, ups, weight(F, H_out), up_bias, bias(H_out)], ids.to(DEVICE)


def moved(args, dtype):
    """Leaves of a dtype that keep their layout in memory."""

    def leaf(t):
        return t.detach().to(dtype, copy=True).requires_grad_()

    return [[leaf(t) for t in a] if isinstance(a, list) else leaf(a) for a in args]


def flat(args):
    return [t for a in args for t in (a if isinstance(a, list) else [a])]


def reference(args, ids, spec, direction, dtype):
    """Result and gradients by the formula, products in the dtype."""
    x, w, *lists = args = moved(args, dtype)
    out = moe_ref(x, ids, w, *lists, spec)
    grads = torch.autograd.grad(out, flat(args), direction.to(out.dtype), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(flat(args), grads))]


def by_kernel(args, ids, spec, direction, dtype, config=small, save=True):
    """The same by the kernels; what they leave unwritten is NaN."""
    args = [[t.detach() for t in a] if isinstance(a, list) else a.detach() for a in moved(args, dtype)]
    x, w, *lists = args
    p = Experts.of(x, ids, w, *lists, spec)
    torch.use_deterministic_algorithms(True)
    try:
        out, hidden = moe_triton.forward(p, save, config)
        g = moe_triton.backward(p, direction.to(out.dtype), hidden, Wanted(), config)
    finally:
        torch.use_deterministic_algorithms(False)
    for t, d in zip(flat(lists), flat([g.up, g.down, g.up_bias, g.down_bias])):
        assert d.stride() == t.stride()
    return [out, g.x, g.weights, *g.up, *g.down, *g.up_bias, *g.down_bias]


def compare(spec, dtype=torch.float32, config=small, save=True, **sizes):
    args, ids = arguments(spec, **sizes)
    T, H_out = args[0].shape[0], args[3][0].shape[-1]
    direction = torch.randn(T, H_out, generator=torch.Generator().manual_seed(6)).half().double().to(DEVICE)
    exact = reference(args, ids, spec, direction, torch.float64)
    own = reference(args, ids, spec, direction, dtype)
    got = by_kernel(args, ids, spec, direction, dtype, config, save)
    names = ["out", *(f"{n}{i}" for n, a in zip(NAMES, args) for i in range(len(a) if isinstance(a, list) else 1))]
    around = max(float(t.abs().max()) for t in exact if t.numel())
    verdicts = {n: tolerated(g, o, x, around) for n, g, o, x in zip(names, got, own, exact, strict=True)}
    wrong = {n: v for n, v in verdicts.items() if v}
    assert not wrong, wrong


def test_an_expert_that_32_bits_cannot_count_is_copied():
    near = torch.empty(256, 7168, 4096, device="meta")
    far = torch.empty(7168, 4096, 256, device="meta").permute(2, 0, 1)
    assert moe_triton.alike([near])[0] is near and moe_triton.alike([near.mT])[0].stride() == near.mT.stride()
    assert moe_triton.alike([far])[0].stride() == near.stride()


@pytest.mark.parametrize(
    "weigh, dtype", [("output", torch.float32), ("output", torch.float16), ("input", torch.float16)]
)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_forward_and_backward(spec, weigh, dtype):
    compare(f"{spec}; weigh={weigh}", dtype)


@pytest.mark.parametrize("stacked, transposed", [(True, True), (False, False)])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_weights_that_lie_transposed_and_experts_of_their_own(spec, stacked, transposed):
    compare(spec, stacked=stacked, transposed=transposed, biases=not transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_descriptors(spec, transposed):
    compare(spec, config=described, transposed=transposed)


@pytest.mark.parametrize("H, F, H_out", [(40, 24, 56), (64, 96, 32)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_trips_of_two_steps(spec, transposed, H, F, H_out):
    compare(spec, config=halved, transposed=transposed, H=H, F=F, H_out=H_out)


@pytest.mark.parametrize("config", [small, halved])
@pytest.mark.parametrize("F", [96, 40])
@pytest.mark.parametrize("stacked", [True, False])
def test_two_sets_of_weights_are_one_sum(stacked, F, config):
    compare(SPECS["separate"], F=F, stacked=stacked, transposed=stacked, config=config)


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_beyond_the_last_add_nothing(transposed):
    """A pair whose expert has an infinite weight in the last column has an infinite gradient, and no pair NaN."""
    spec = "act = u; layout=plain; weigh=input"
    args, ids = arguments(spec, K=1, biases=False, transposed=transposed, ids=torch.arange(12)[:, None] % 4)
    args[2][0][2, -1, -1] = torch.inf
    direction = torch.ones(12, args[3][0].shape[-1], dtype=torch.float64, device=DEVICE)
    grad = by_kernel(args, ids, spec, direction, torch.float32)[2]
    assert (grad.isinf() == (ids == 2)).all() and not grad.isnan().any()


@pytest.mark.parametrize("K, H, F, H_out", [(1, 33, 17, 19), (4, 64, 32, 32), (2, 7, 5, 3)])
def test_sizes(K, H, F, H_out):
    compare(SPECS["chunk"], K=K, H=H, F=F, H_out=H_out, T=9)
    compare(SPECS["interleave"], K=K, H=H, F=F, H_out=H_out, T=1)


@pytest.mark.parametrize("weigh", ["output", "input"])
@pytest.mark.parametrize("dropped", [-1, 4, 9])
def test_dropped_pairs_and_experts_without_tokens(weigh, dropped):
    ids = torch.full((12, 2), dropped)
    ids[::2, 0], ids[1::3, 1] = 3, 1
    compare(f"{SPECS['chunk']}; weigh={weigh}", ids=ids)
    compare(f"{SPECS['chunk']}; weigh={weigh}", T=3, ids=torch.full((3, 2), -1))


def test_one_expert_takes_all():
    compare(SPECS["chunk"], T=40, K=1, ids=torch.full((40, 1), 3))
    compare(SPECS["interleave"], T=20, K=2, ids=torch.tensor([[2, 0]]).expand(20, 2))


def test_hidden_is_computed_again_where_it_was_not_saved():
    compare(SPECS["interleave"], save=False)


def test_no_tokens():
    compare(SPECS["chunk"], T=0, ids=torch.empty(0, 2, dtype=torch.int64))


def test_result_in_another_dtype():
    args, ids = arguments(SPECS["chunk"])
    x, w, *lists = ([t.half() for t in a] if isinstance(a, list) else a.half() for a in args)
    out, _ = moe_triton.forward(Experts.of(x, ids, w, *lists, SPECS["chunk"] + "; out=float32"), False, small)
    exact = moe_ref(args[0], ids, args[1], *args[2:], SPECS["chunk"])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("weigh", ["output", "input"])
@pytest.mark.parametrize("name", ["x", "weights", "projections", "biases"])
def test_only_what_is_wanted_is_made(name, weigh):
    args, ids = arguments(SPECS["chunk"])
    x, w, *lists = args = [[t.float() for t in a] if isinstance(a, list) else a.float() for a in args]
    p = Experts.of(x, ids, w, *lists, f"{SPECS['chunk']}; weigh={weigh}")
    out, hidden = moe_triton.forward(p, True, small)
    grad = torch.randn_like(out)
    wanted = Wanted(**{n: n == name for n in ("x", "weights", "projections", "biases")})
    one, every = (moe_triton.backward(p, grad, hidden, which, small) for which in (wanted, Wanted()))
    kinds = {"x": [0], "weights": [1], "projections": [2, 3], "biases": [4, 5]}
    fields = ("x", "weights", "up", "down", "up_bias", "down_bias")
    for i, field in enumerate(fields):
        for a, b in zip(flat([getattr(one, field)]), flat([getattr(every, field)])):
            assert torch.equal(a, b) if i in kinds[name] else a.numel() == 0


def test_a_schedule_gives_every_row_to_one_program():
    ids = torch.tensor([[2, 0], [2, -1], [2, 0], [2, 5], [2, 2]])
    routing = Routing.of(ids, 6)
    table = Schedule.of(routing, 2).table.tolist()
    assert [tuple(pair) for pair in zip(*table)][:6] == [(0, 0), (2, 2), (2, 4), (2, 6), (5, 8), (6, 9)]
    assert Schedule.of(routing, 16).programs == 7 and Schedule.of(routing, 1).programs == 10


def test_what_is_not_served_is_said():
    def reason(spec="act = u", dtype=torch.bfloat16, arch="sm90", **more):
        return moe_triton.supports(ExpertNeed(MoESpec.parse(spec), dtype, device=Device.typical(arch), **more))

    assert reason() is None and reason(SPECS["interleave"], backward=True) is None
    assert "no configs for sm75" in reason(arch="sm75")
    assert "float64" in reason(dtype=torch.float64)
    assert "at most" in reason(experts=256, stacked=False)
    assert reason(experts=256) is None


def test_configs_follow_the_rows_of_an_expert():
    assert [row_block(m) for m in (1, 6, 12, 40, 100, 5000)] == [16, 16, 32, 64, 128, 128]
    assert formula(Device.typical("sm90"), "up", 2, 6).BLOCK_M == 16
