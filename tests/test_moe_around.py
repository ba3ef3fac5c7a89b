"""A mixture of experts and what is around it: ids that are given, sums of several, numbers that change, roundings."""

import pytest
import torch

from tests import harness
from tests.moe_spellings import CORPUS, Block
from tests.test_moe_corpus import moe_refusals, moe_sites
from tvcompile.moe_spec import MoESpec


class Given(torch.nn.Module):
    """The experts alone: ids and weights are inputs."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, ids, w):
        return self.block.experts(x, ids, w)


class GatheredWeights(Block):
    def __init__(self, bias, combine):
        self.bias, self.combine = bias, combine
        super().__init__()

    def experts(self, x, ids, w):
        def product(x, weight, bias):
            y = torch.einsum("tki,tkio->tko", x, weight[ids])
            return y if bias is None else y + bias[ids]

        return self.combine(self.mlp(x.unsqueeze(1).expand(-1, self.top, -1), product), w)


@pytest.mark.parametrize("combine", ["sum", "einsum", "bmm", "matmul"])
@pytest.mark.parametrize("bias", [False, True])
def test_ids_and_weights_may_be_inputs(combine, bias):
    """A weight [T,K] of results is no weight of a projection."""
    combines = {
        "sum": lambda y, w: (y * w.unsqueeze(-1)).sum(1),
        "einsum": lambda y, w: torch.einsum("tkh,tk->th", y, w),
        "bmm": lambda y, w: torch.bmm(w.unsqueeze(1), y).squeeze(1),
        "matmul": lambda y, w: (y.mT @ w.unsqueeze(-1)).squeeze(-1),
    }
    torch.manual_seed(0)
    block = GatheredWeights(bias, combines[combine])
    w, ids = torch.randn(9, 4).softmax(-1).topk(2, -1)
    report = harness.run(Given(block), [torch.randn(9, 24), ids, w], True)
    assert len(moe_sites(report)) == 1, [str(r) for r in report.refusals]


class Summed(torch.nn.Module):
    """Two mixtures of one input, `joined` in one sum."""

    def __init__(self, joined):
        super().__init__()
        self.blocks = torch.nn.ModuleList(CORPUS["dense.MaskedSum"].build(torch.float32) for _ in range(2))
        self.joined = joined

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        routes = [(block, *block.route(flat)) for block in self.blocks]
        return self.joined(flat, routes).view(x.shape)


def added(x, routes):
    first, second = (block.experts(x, ids, w) for block, w, ids in routes)
    return x + (first + second)


def in_one_chain(x, routes):
    out = x
    for block, w, ids in routes:
        for e in range(block.count):
            out = out + (w * (ids == e)).sum(-1, keepdim=True) * block.expert(x, e)
    return out


def rows_in_one_chain(x, routes):
    out = torch.zeros_like(x)
    for block, w, ids in routes:
        for e in range(block.count):
            token, k = torch.where(ids == e)
            out.index_add_(0, token, block.expert(x[token], e) * w[token, k, None])
    return out


@pytest.mark.parametrize("joined", [added, in_one_chain, rows_in_one_chain], ids=lambda f: f.__name__)
def test_two_mixtures_in_one_sum_are_two_sites(joined):
    report = harness.run(Summed(joined), CORPUS["dense.MaskedSum"].make_inputs(torch.float32), True)
    assert len(moe_sites(report)) == 2, [str(r) for r in report.refusals]


def test_a_mixture_that_is_refused_beside_one_that_is_fused_says_why():
    def chain(x, routes):
        out = torch.zeros_like(x)
        for (block, w, ids), left_out in zip(routes, (0, 1)):
            for e in range(block.count - left_out):
                token, k = torch.where(ids == e)
                out.index_add_(0, token, block.expert(x[token], e) * w[token, k, None])
        return out

    report = harness.run(Summed(chain), CORPUS["dense.MaskedSum"].make_inputs(torch.float32), True)
    assert len(moe_sites(report)) == 1
    assert any("a part of a weight" in r.reason for r in moe_refusals(report)), report.refusals


class ByANumber(torch.nn.Module):
    """Results, or their weights, with a number in them that may change: a size, a float argument."""

    def __init__(self, how, weigh):
        super().__init__()
        self.block, self.how, self.weigh = CORPUS["dense.MaskedSum.own"].build(torch.float32), how, weigh

    def forward(self, x, number):
        x = x.reshape(-1, x.shape[-1])
        w, ids = self.block.route(x)
        number, out = len(x) if number is None else number, torch.zeros_like(x)
        w = w if self.weigh else torch.ones_like(w)
        for e in range(self.block.count):
            w_e = (w * (ids == e)).sum(-1, keepdim=True)
            y = self.block.expert(x, e)
            out = (
                torch.sub(out, y * w_e, alpha=number)
                if self.how == "alpha"
                else out + y * (w_e / number if self.how == "weights" else w_e)
            )
        return out / number if self.how == "results" else out


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("number", [None, 0.7])
@pytest.mark.parametrize("weigh", [True, False])
@pytest.mark.parametrize("how", ["results", "weights", "alpha"])
def test_numbers_that_may_change(how, weigh, number, dynamic):
    report = harness.run(
        ByANumber(how, weigh), (*CORPUS["dense.MaskedSum"].make_inputs(torch.float32), number), True, dynamic=dynamic
    )
    assert len(moe_sites(report)) == 1, report


class WeighedByASize(torch.nn.Module):
    def __init__(self, weigh):
        super().__init__()
        self.block, self.weigh = CORPUS["dense.MaskedSum.own"].build(torch.float32), weigh

    def forward(self, x):
        x = x.reshape(-1, x.shape[-1])
        w, ids = self.block.route(x)
        return self.block.experts(x, ids, self.weigh(w, len(x)))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "weigh",
    [
        lambda w, n: torch.where(w > 0.3, w, n),
        lambda w, n: w * torch.where(w > 0.3, n, 2),
        lambda w, n: torch.maximum(w, torch.full((), n / 100)),
        lambda w, n: w**n + n**0.5 / (w + n // 2),
    ],
    ids=["where", "numbers", "maximum", "powers"],
)
def test_sizes_in_weights(weigh, dynamic):
    inputs = CORPUS["dense.MaskedSum"].make_inputs(torch.float32)
    report = harness.run(WeighedByASize(weigh), inputs, True, dynamic=dynamic)
    assert len(moe_sites(report)) == 1, report


class InFloat32(torch.nn.Module):
    """Results of experts in bfloat16, summed in float32; or those in float16, summed in it."""

    def __init__(self, use, dtype=torch.bfloat16):
        super().__init__()
        self.block, self.use = CORPUS["dense.MaskedSum.own"].build(dtype), use

    def forward(self, x):
        x = x.reshape(-1, x.shape[-1])
        w, ids = self.block.route(x)
        return self.use(self.block.experts(x, ids, w.float() if x.dtype == torch.bfloat16 else w), x)


@pytest.mark.parametrize(
    "use, out",
    [
        (lambda y, x: y.bfloat16() * 2, ""),
        (lambda y, x: y.type_as(x) + x, ""),
        (lambda y, x: y.half() + x, "float16"),
        (lambda y, x: (y.bfloat16() * 2, y), "float32"),
        (lambda y, x: y.double() + x, "float32"),
        (lambda y, x: y.int() + x, "float32"),
        (lambda y, x: y.to(torch.float8_e4m3fn).float() + x, "float32"),
        (lambda y, x: x.to(y).type_as(x) + y, "float32"),
    ],
    ids=["rounded", "type_as", "half", "kept", "double", "int", "float8", "asked"],
)
def test_results_are_rounded_once_where_nothing_else_sees_them(use, out):
    inputs = CORPUS["dense.MaskedSum"].make_inputs(torch.bfloat16)
    (site,) = moe_sites(harness.run(InFloat32(use), inputs, True))
    assert MoESpec.parse(site.spec).out == out


class AfterABase(InFloat32):
    """The sum begins with the tokens, in float32, and is rounded at its end."""

    def forward(self, x):
        x = x.reshape(-1, x.shape[-1])
        (w, ids), out = self.block.route(x), x.float()
        for e in range(self.block.count):
            weight = (w * (ids == e)).sum(-1, keepdim=True)
            out = out + self.block.expert(x, e) * weight.float()
        return self.use(out, x)


def test_a_sum_that_begins_with_a_base_is_rounded_after_it():
    inputs = CORPUS["dense.MaskedSum"].make_inputs(torch.bfloat16)
    (site,) = moe_sites(harness.run(AfterABase(lambda out, x: out.bfloat16() * 2), inputs, True))
    assert MoESpec.parse(site.spec).out == "float32"


def test_results_in_float16_that_become_bfloat16_are_rounded_twice():
    inputs = CORPUS["dense.MaskedSum"].make_inputs(torch.float16)
    program = InFloat32(lambda y, x: y.bfloat16() * 2, torch.float16)
    (site,) = moe_sites(harness.run(program, inputs, True))
    assert MoESpec.parse(site.spec).out == ""


def test_results_that_are_divided_by_0():
    report = harness.run(
        ByANumber("weights", True), (*CORPUS["dense.MaskedSum"].make_inputs(torch.float32), 0.0), False, dynamic=False
    )
    assert not moe_sites(report)
