"""Every spelling of a mixture of experts is fused into one site and right; impostors are refused or right.

Spellings train in float32 (those that ask for it in bfloat16) and infer in bfloat16: outputs, losses, all gradients.
"""

import re

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import tvcompile
from tests import harness
from tests.moe_impostors import IMPOSTORS
from tests.moe_impostors.experts import DropoutInExperts
from tests.moe_spellings import CORPUS, Block
from tests.moe_spellings.capacity import SwitchInFloats
from tests.moe_spellings.grouped import SortHistcInverse
from tests.moe_spellings.loops import WhereIndexAdd
from tests.moe_spellings.thresholds import AboveHalf
from tvcompile.moe_spec import MoESpec
from tvcompile.passes import terms_of

# Running sums of a mask of ones and zeros.
RUNNING = {
    "exact": lambda mask: mask.cumsum(0),
    "summed": lambda mask: mask.bfloat16().cumsum(0),
    "summed and whole": lambda mask: mask.bfloat16().cumsum(0).long(),
    "rounded": lambda mask: mask.cumsum(0).bfloat16(),
    "rounded and back": lambda mask: mask.cumsum(0).bfloat16().float(),
}
CASES = [pytest.param(s, mode, id=f"{name}-{mode}") for name, s in CORPUS.items() for mode in s.modes]


def moe_sites(report):
    return [site for site in report.sites if site.spec.startswith("act =")]


def moe_refusals(report):
    """Without what the attention pass says of the router's softmax."""
    return [refusal for refusal in report.refusals if "softmax" not in refusal.anchor]


@pytest.mark.parametrize("spelling, mode", CASES)
def test_spelling(spelling, mode):
    train, dtype = (True, spelling.dtype) if mode == "train" else (False, torch.bfloat16)
    report = harness.run(spelling.build(dtype), spelling.make_inputs(dtype), train)
    sites = moe_sites(report)
    assert len(sites) == 1, [str(r) for r in report.refusals]
    assert len(harness.nodes_of(report, torch.ops.tv.moe.default)) == 1
    assert spelling.accepts(sites[0].spec), sites[0].spec
    assert not any(re.search("nonzero|where.default", str(n.target)) for n in harness.all_nodes(report)), "a size waits"


@pytest.mark.parametrize("name", CORPUS)
def test_spelling_computes_its_formula(name):
    """The corpus itself: eager gives, in float64, what the formula gives with every expert on every token."""
    spelling = CORPUS[name]
    block, (x,) = spelling.build(torch.float64), spelling.make_inputs(torch.float64)
    with torch.no_grad():
        for got, expected in zip(harness.leaves(block(x)), harness.leaves(block.reference(x)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostor(name):
    impostor = IMPOSTORS[name]
    spelling = impostor.spelling
    report = harness.run(spelling.build(spelling.dtype), spelling.make_inputs(spelling.dtype), impostor.train)
    if impostor.reason is None:
        return
    assert not moe_sites(report), [site.spec for site in report.sites]
    if not impostor.reason:
        return
    refusals = moe_refusals(report)
    assert any(re.search(impostor.reason, refusal.reason) for refusal in refusals), refusals
    assert all(re.search(r"tests/moe_\w+/\w+\.py:\d+", refusal.where) for refusal in refusals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("running", RUNNING)
def test_places_that_are_rounded_are_no_counts(running, dtype):
    """All tokens go to one expert, and bfloat16 counts to 256: some share a place. Nothing else is rounded."""
    block = SwitchInFloats()
    block.running, block.capacity = RUNNING[running], 590
    x = torch.randn(600, 24).to(dtype)
    block.route = lambda x: torch.topk((block.gate(x) + 100 * (torch.arange(block.count) == 1)).softmax(-1), 1)
    block = block.to(dtype)
    with tvcompile.collect() as report, torch.no_grad():
        got = torch.compile(block, backend="tv", options=harness.STRICT)(x.view(1, 600, 24))
    assert len(moe_sites(report)) == (running == "exact")
    torch.testing.assert_close(got, block(x.view(1, 600, 24)), atol=2e-2, rtol=2e-2)


class WhereManyAre(Block):
    """Experts count where more than 300 tokens have them; in bfloat16, 301 is 300."""

    top = 1

    def route(self, x):
        return torch.topk((self.gate(x) + 100 * (torch.arange(self.count) == 1)).softmax(-1), 1)

    def experts(self, x, ids, w):
        load, out = F.one_hot(ids, self.count).bfloat16().sum((0, 1)), torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where((ids == e) & (load[e] > 300))
            out = out.index_add(0, token, self.expert(x[token], e) * w[token, k, None])
        return out


@pytest.mark.parametrize("tokens", [301, 302])
def test_counts_that_a_sum_rounds_are_no_counts(tokens):
    block, x = WhereManyAre(), torch.randn(1, tokens, 24)
    assert bool(block(x).abs().max() > 0) == (tokens == 302)
    harness.run(block, [x], False)


def test_sent_above_a_weight_in_bfloat16():
    """A comparison with what is not zero is no question of its sign."""
    spelling = IMPOSTORS["SentAboveAWeight"].spelling
    report = harness.run(spelling.build(torch.bfloat16), spelling.make_inputs(torch.bfloat16), False)
    assert not moe_sites(report)


PRECISE = (
    "dense.EinsumOverExperts", "dense.MaskedSum", "loops.WhereIndexPlus", "loops.BooleanPlus",
    "loops.ChoiceByChoice.relu2.own", "loops.ThreeDims.three", "loops.AddedToTheTokens", "loops.WeighedInside",
    "capacity.GShard.argmax_twice.relu", "capacity.GShardByPositiveWeights.renormalised.4.gelu.bias",
    "grouped.SortHistcInverse", "buffers.Buffer",
)  # fmt: skip


@pytest.mark.parametrize("name", PRECISE)
def test_weights_may_be_more_precise_than_tokens(name, monkeypatch):
    """A router in float32 beside experts in bfloat16: products and sums of both are in float32, and cast where kept."""

    def route(self, x, route=Block.route):
        w, ids = route(self, x)
        return w.float() if x.dtype == torch.bfloat16 else w, ids

    monkeypatch.setattr(Block, "route", route)
    spelling = CORPUS[name]
    report = harness.run(spelling.build(torch.bfloat16), spelling.make_inputs(torch.bfloat16), False)
    assert len(moe_sites(report)) == 1, [str(r) for r in report.refusals]


@pytest.mark.parametrize("name", ["buffers.Buffer", "capacity.GShard.argmax_twice.relu", "loops.BooleanPlus"])
def test_training_under_autocast(name):
    """Against all in float32; eager under autocast is the yardstick."""
    block, (x,) = CORPUS[name].build(torch.float32), CORPUS[name].make_inputs(torch.float32)

    def train(call, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return harness.observe(call, block, [harness.fresh(x, None, True)], True).tensors

    exact, eager = train(block, False), train(block, True)
    with tvcompile.collect() as report:
        got = train(torch.compile(block, backend="tv", options=harness.STRICT, fullgraph=True), True)
    assert len(moe_sites(report)) == 1, [str(r) for r in report.refusals]
    assert [t.dtype for t in got.values()] == [t.dtype for t in eager.values()]
    for tensor, t in got.items():
        wrong = harness.tolerated(t.float(), eager[tensor].float(), exact[tensor].float())
        assert not wrong, f"{tensor}: {wrong}"


class Normed(torch.nn.Module):
    """Tokens are computed, by formulas that a reader can open, also from another mixture."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            out = block(x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6))
            x = x + (out[0] if isinstance(out, tuple) else out)
        return x


COMPUTED = (
    "buffers.Buffer", "buffers.ChoiceAfterChoice", "buffers.IndexAddSelect.relu.bias",
    "capacity.SwitchEinsum.top1.relu", "capacity.GShard.argmax_twice.relu", "capacity.PairsSummed.relu",
    "capacity.MaskedResidual.oi.bias", "loops.WhereIndexAdd", "grouped.SortHistcInverse", "dense.MaskedSum",
)  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_tokens_may_be_computed(name):
    program = Normed(*(CORPUS[name].build(torch.float32) for _ in range(2)))
    report = harness.run(program, CORPUS[name].make_inputs(torch.float32), True)
    assert len(moe_sites(report)) == 2, [str(r) for r in report.refusals]


class Deep(torch.nn.Module):
    """A gated mixture behind many gated and normed projections, each of which reads the one before it thrice."""

    def __init__(self, layers):
        super().__init__()
        self.block, self.layers = CORPUS["dense.MaskedSum"].build(torch.float32), layers
        self.weight = torch.nn.Parameter(torch.randn(24, 24) / 5)

    def forward(self, x):
        for _ in range(self.layers):
            x = (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)) @ self.weight
            x = x * (x @ self.weight).mean(-1, keepdim=True).sigmoid()
        return x + self.block(x) * (x @ self.weight[:, :1]).sigmoid()


def test_what_comes_before_a_mixture_is_looked_through_once(monkeypatch):
    asked, chooses = [], terms_of.chooses

    def counted(r, e):
        asked.append(e)
        assert len(asked) < 2000, "the same tensors are looked through again and again"
        return chooses(r, e)

    monkeypatch.setattr(terms_of, "chooses", counted)
    report = harness.run(Deep(8), CORPUS["dense.MaskedSum"].make_inputs(torch.float32), False)
    assert len(moe_sites(report)) == 1 and asked


@pytest.mark.parametrize("train", [True, False])
def test_dropout_in_experts_is_refused(train):
    block = DropoutInExperts()
    block.probability = 0.3
    with tvcompile.collect() as report, torch.set_grad_enabled(train):
        call = torch.compile(block, backend="tv", options=harness.STRICT, fullgraph=True)
        call(torch.randn(3, 7, 24))
    assert not moe_sites(report) and moe_refusals(report)


DYNAMIC = (
    *("grouped.SortHistcInverse", "loops.WhereIndexAdd", "dense.MaskedSum", "loops.MaskedSequences"),
    *("known.GptOss", "dense.ScaledByAFloat"),
)


@pytest.mark.parametrize("name", DYNAMIC)
def test_spelling_with_dynamic_shapes(name):
    spelling = CORPUS[name]
    report = harness.run(spelling.build(torch.float32), spelling.make_inputs(torch.float32), True, dynamic=True)
    assert len(moe_sites(report)) == 1, [str(r) for r in report.refusals]


@pytest.mark.parametrize("names", [("loops.WhereIndexAdd", "dense.MaskedSum"), ("grouped.SortHistcInverse",) * 2])
def test_two_layers_are_two_sites(names):
    blocks = [CORPUS[name].build(torch.float32) for name in names]
    program = torch.nn.Sequential(blocks[0], torch.nn.Tanh(), blocks[1])
    report = harness.run(program, CORPUS[names[0]].make_inputs(torch.float32), True)
    assert len(moe_sites(report)) == 2, [str(r) for r in report.refusals]


class AsManyAs(Block):
    """Each token has as many experts as another input has rows."""

    def forward(self, x, other):
        x = x.reshape(-1, x.shape[-1])
        w, ids = self.gate(x).softmax(-1).topk(other.shape[0], -1)
        matrix, out = x.new_zeros(len(x), self.count).scatter(1, ids, w), torch.zeros_like(x)
        for e in range(self.count):
            (token,) = torch.where(matrix[:, e] > 0)
            out = out.index_add(0, token, self.expert(x[token], e) * matrix[token, e, None])
        return out


def test_how_many_experts_a_token_has_is_a_number():
    inputs = (*CORPUS["dense.MaskedSum"].make_inputs(torch.float32), torch.randn(3, 2))
    report = harness.run(AsManyAs(), inputs, True, dynamic=True)
    assert not moe_sites(report) and "no number that is known" in str(moe_refusals(report))
    torch._dynamo.reset()
    assert len(moe_sites(harness.run(AsManyAs(), inputs, True, dynamic=False))) == 1


def test_ids_that_are_computed_are_ids():
    """No condition for each expert, of which a token would have as many as there are experts."""
    spelling = CORPUS["loops.IntervalsClamped"]
    report = harness.run(spelling.build(torch.float32), spelling.make_inputs(torch.float32), True)
    assert "K=1," in str(moe_sites(report)[0])


class PlacesByAFloat(Block):
    """A capacity that the program computes from the number of tokens: int(1.25 * T / E)."""

    own, top = True, 1

    def experts(self, x, ids, w):
        C, hits = int(1.25 * x.shape[0] / self.count), F.one_hot(ids[:, 0], self.count)
        place = (hits.cumsum(0) * hits).sum(-1) - 1
        place = F.one_hot(torch.where(place < C, place, C), C + 1)[:, None, :C]
        dispatch = (hits[..., None] * place).to(x.dtype)
        rows = torch.einsum("tec,th->ech", dispatch, x)
        y = torch.stack([self.expert(rows[e], e) for e in range(self.count)])
        return torch.einsum("tec,ech->th", dispatch * w[:, :, None], y)


def test_a_capacity_that_is_computed_from_a_size():
    """What is emitted compares places with a number that no tensor of the graph has as a size."""
    report = harness.run(PlacesByAFloat(), CORPUS["dense.MaskedSum"].make_inputs(torch.float32), True, dynamic=True)
    assert len(moe_sites(report)) == 1, [str(r) for r in report.refusals]


def test_half_of_the_experts_is_no_mixture():
    spelling = CORPUS["layers.SummedInPairs.own"]
    report = harness.run(spelling.build(torch.float32), spelling.make_inputs(torch.float32), True)
    assert [" E=4," in site.shapes for site in moe_sites(report)] == [True], report


def test_layers_whose_residual_begins_the_sum_are_two_sites():
    blocks = [CORPUS["layers.ResidualThenDense.own"].build(torch.float32) for _ in range(2)]
    inputs = CORPUS["dense.MaskedSum"].make_inputs(torch.float32)
    report = harness.run(torch.nn.Sequential(*blocks), inputs, True)
    assert len(moe_sites(report)) == 2, [str(r) for r in report.refusals]


@pytest.mark.parametrize("spelling", ["grouped", "scattered"])
@pytest.mark.parametrize("again", [False, True])
def test_experts_that_are_drawn(spelling, again):
    """Drawn without putting back, ids of a token differ and are numbers of experts; put back they may be alike."""
    block = (Drawn if spelling == "grouped" else DrawnAndScattered)(again)
    x = CORPUS["dense.MaskedSum"].make_inputs(torch.float32)[0].detach()
    compiled = torch.compile(block, backend="tv", options={"tv.strict": True, "tv.codegen": "none"})
    with torch.no_grad(), tvcompile.collect() as report:
        torch.manual_seed(0)
        expected = block(x)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    (site,) = moe_sites(report)
    # Conditions on the matrix hold for any number of experts where ids may be alike.
    assert f"K={block.count if again and spelling == 'scattered' else block.top}," in str(site)


class GatesDropped(AboveHalf):
    own = True

    def gates(self, x):
        return F.dropout(super().gates(x), 0.5)


def test_gates_that_are_dropped_out():
    """Whether an expert counts was drawn, and its weight is that of the same draw."""
    block, x = GatesDropped(), CORPUS["dense.MaskedSum"].make_inputs(torch.float32)[0].detach()
    compiled = torch.compile(block, backend="tv", options=harness.STRICT)
    with torch.no_grad(), tvcompile.collect() as report:
        torch.manual_seed(0)
        expected = block(x)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    assert len(moe_sites(report)) == 1


class Drawn(SortHistcInverse):
    def __init__(self, again):
        super().__init__()
        self.again = again

    def route(self, x):
        p = self.gate(x).softmax(-1)
        ids = torch.multinomial(p, self.top, replacement=self.again)
        return torch.full_like(p[:, : self.top], 0.5), ids


class DrawnAndScattered(Drawn):
    def experts(self, x, ids, w):
        matrix, out = x.new_zeros(len(x), self.count).scatter(1, ids, w), torch.zeros_like(x)
        for e in range(self.count):
            (token,) = torch.where(matrix[:, e] != 0)
            out.index_add_(0, token, self.expert(x[token], e) * matrix[token, e, None])
        return out


class Checkpointed(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


@pytest.mark.parametrize("name", ["grouped.SortHistcInverse", "dense.MaskedSum", "batched.Einsums"])
def test_in_an_activation_checkpoint(name):
    spelling = CORPUS[name]
    program = Checkpointed(spelling.build(torch.float32))
    report = harness.run(program, spelling.make_inputs(torch.float32), True)
    assert len(moe_sites(report)) == 1, [str(r) for r in report.refusals]


class EachCheckpointed(WhereIndexAdd):
    def expert(self, rows, e):
        return torch.utils.checkpoint.checkpoint(super().expert, rows, e, use_reentrant=False)


def test_a_checkpoint_around_each_expert_leaves_the_program_right():
    """How many rows there are only data tells."""
    assert not moe_sites(
        harness.run(EachCheckpointed(), CORPUS["loops.WhereIndexAdd"].make_inputs(torch.float32), True)
    )


class Elu(WhereIndexAdd):
    kind, alpha = "relu", 0.7

    def expert(self, rows, e):
        return F.elu(rows @ self.w_up[e], self.alpha) @ self.w_down[e]


@pytest.mark.parametrize("dynamic", [None, True])
def test_an_activation_by_a_number_of_the_module(dynamic):
    """With dynamic shapes it is one that may change."""
    inputs = CORPUS["loops.WhereIndexAdd"].make_inputs(torch.float32)
    report = harness.run(Elu(), inputs, True, dynamic=dynamic)
    assert len(moe_sites(report)) == (dynamic is None)


def test_accepting_is_by_meaning():
    chunk, interleave = (CORPUS[n] for n in ("loops.WhereIndexAdd", "batched.OneChoiceAtATime.oi.interleave"))
    assert chunk.accepts(str(MoESpec.parse("act = sigmoid(g)*g*u; layout=chunk")))
    assert not chunk.accepts("act = sigmoid(u)*u*g; layout=chunk")
    assert chunk.accepts("act = sigmoid(u)*u*g; layout=separate")
    assert not chunk.accepts("act = sigmoid(g)*g*u; layout=chunk; weigh=input")
    assert not chunk.accepts("act = sigmoid(g)*g*u; layout=interleave")
    assert interleave.accepts("act = g/(1 + exp(-g))*u; layout=interleave")
