"""Attention and mixtures of experts inside torch.vmap, and the vmaps that leave a graph whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tvcompile
from tests import harness
from tests.moe_spellings.base import FF, Block, H
from tests.test_moe_corpus import moe_sites

torch.manual_seed(0)
QKV = [torch.randn(2, 4, 9, 16, requires_grad=True) for _ in range(3)]


def head(q, k, v):
    return torch.softmax(q @ k.T * 0.25, -1) @ v


def causal(q, k, v):
    keep = torch.ones(len(q), len(k), dtype=torch.bool).tril()
    return torch.softmax((q @ k.T * 0.25).masked_fill(~keep, float("-inf")), -1) @ v


def group(q, k, v):
    weights = torch.einsum("gqd,kd->gqk", q, k).mul(0.25).softmax(-1)
    return torch.einsum("gqk,kd->gqd", weights, v)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def of_documents(q, k, v, document):
    """Some rows have no key at all."""
    keep = (document[:, None] == document) & (document[:, None] > 0)
    return F.scaled_dot_product_attention(q, k, v, keep)


def in_place(q, k, v):
    scores = q @ k.mT
    scores *= 0.25
    return scores.softmax(-1) @ v


PROGRAMS = {
    "heads": torch.vmap(torch.vmap(head)),
    "causal heads": torch.vmap(torch.vmap(causal)),
    "heads last": torch.vmap(torch.vmap(head), in_dims=-1, out_dims=-1),
    "groups": lambda q, k, v: torch.vmap(torch.vmap(group))(q.unflatten(1, (2, 2)), k[:, :2], v[:, :2]),
    "batches": torch.vmap(sdpa),
    "in place": torch.vmap(in_place),
    "chunks": torch.vmap(in_place, chunk_size=1),
    "shared keys": lambda q, k, v: torch.vmap(torch.vmap(head, (0, None, None)))(q, k[:, 0], v[:, 0]),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_attention_inside_is_fused(name, dynamic):
    inputs = [x.permute(2, 3, 0, 1).detach().requires_grad_() for x in QKV] if name == "heads last" else QKV
    report = harness.run(PROGRAMS[name], inputs, True, dynamic=dynamic)
    assert len(report.sites) == (2 if name == "chunks" else 1), [str(r) for r in report.refusals]


def test_rows_without_a_key_give_zeros():
    document = torch.tensor([[0, 1, 1, 1, 2, 2, 2, 0, 3], [1, 1, 1, 1, 0, 0, 0, 0, 0]])
    report = harness.run(torch.vmap(of_documents), [*QKV, document], True)
    assert len(report.sites) == 1, [str(r) for r in report.refusals]


class Experts(Block):
    order, kind, bias = "oi", "gelu", True

    def one(self, x, up, b_up, down, b_down):
        return F.linear(F.gelu(F.linear(x, up, b_up)), down, b_down)

    def weights(self):
        return self.w_up, self.b_up, self.w_down, self.b_down

    def experts(self, x, ids, w):
        every = torch.vmap(self.one, (None, 0, 0, 0, 0))(x, *self.weights())
        return torch.einsum("eth,te->th", every, torch.zeros(len(x), self.count, dtype=w.dtype).scatter(1, ids, w))


class EveryExpertThenGathered(Experts):
    def experts(self, x, ids, w):
        every = torch.vmap(self.one, (None, 0, 0, 0, 0), out_dims=1)(x, *self.weights())
        return (every.gather(1, ids[..., None].expand(-1, -1, H)) * w[..., None]).sum(1)


class EveryToken(Experts):
    def experts(self, x, ids, w):
        def of_choice(x, i):
            return self.one(x, *(p[i] for p in self.weights()))

        return (torch.vmap(torch.vmap(of_choice, (None, 0)))(x, ids) * w[..., None]).sum(1)


class PlacesOfExperts(Experts):
    top, router, capacity = 1, "top1", 5

    def experts(self, x, ids, w):
        mask = F.one_hot(ids[:, 0], self.count)
        place = (mask.cumsum(0) * mask).sum(-1) - 1
        where = F.one_hot(place.clamp(max=self.capacity), self.capacity + 1)[:, : self.capacity]
        sent = (mask[..., None] * where[:, None]).to(x.dtype)
        rows = torch.einsum("tec,th->ech", sent, x)
        return torch.einsum("tec,ech->th", sent * w[..., None], torch.vmap(self.one)(rows, *self.weights()))


class Ensemble(Block):
    """torch.func.functional_call of one module with the stacked parameters of all."""

    own, kind, bias = True, "gelu", True

    def experts(self, x, ids, w):
        names = [name for name, _ in self.list[0].named_parameters()]
        stacked = {name: torch.stack([m.get_parameter(name) for m in self.list]) for name in names}
        every = torch.vmap(lambda p: torch.func.functional_call(self.list[0], p, (x,)))(stacked)
        return torch.einsum("eth,te->th", every, torch.zeros(len(x), self.count, dtype=w.dtype).scatter(1, ids, w))


@pytest.mark.parametrize("block", [Experts, EveryExpertThenGathered, EveryToken, PlacesOfExperts, Ensemble])
@pytest.mark.parametrize("train", [False, True])
def test_experts_inside_are_fused(block, train):
    torch.manual_seed(0)
    report = harness.run(block(), [torch.randn(3, 7, H, requires_grad=True)], train)
    assert len(moe_sites(report)) == 1, [str(r) for r in report.refusals]


class OneProduct(Block):
    """All experts' first projections as one product: the batching rule's, and what users write."""

    kind, order = "swiglu", "io"

    def experts(self, x, ids, w):
        wide = x @ self.w_up.permute(1, 0, 2).reshape(H, -1)
        hidden = self.activate(wide.view(len(x), self.count, 2 * FF))
        every = torch.einsum("tef,efh->teh", hidden, self.w_down)
        return (every.gather(1, ids[..., None].expand(-1, -1, H)) * w[..., None]).sum(1)


class SlicesOfOneProduct(OneProduct):
    def experts(self, x, ids, w):
        wide, out = x @ self.w_up.permute(1, 0, 2).reshape(H, -1), torch.zeros_like(x)
        for e in range(self.count):
            y = self.activate(wide[:, e * 2 * FF : (e + 1) * 2 * FF]) @ self.w_down[e]
            out = out + y * (w * (ids == e)).sum(-1, keepdim=True)
        return out


class HalvesOfOneProduct(OneProduct):
    """All gates, then all ups."""

    def experts(self, x, ids, w):
        gate, up = self.w_up.permute(1, 0, 2).chunk(2, -1)
        wide = x @ torch.cat([gate.reshape(H, -1), up.reshape(H, -1)], -1)
        gates, ups = wide.view(len(x), 2, self.count, FF).unbind(1)
        every = torch.einsum("tef,efh->teh", F.silu(gates) * ups, self.w_down)
        return (every.gather(1, ids[..., None].expand(-1, -1, H)) * w[..., None]).sum(1)


@pytest.mark.parametrize("block", [OneProduct, SlicesOfOneProduct, HalvesOfOneProduct])
def test_a_product_may_be_of_all_experts(block):
    torch.manual_seed(0)
    report = harness.run(block(), [torch.randn(3, 7, H, requires_grad=True)], True)
    assert len(moe_sites(report)) == 1, [str(r) for r in report.refusals]


def without_gradients(q, k, v):
    def one(q):
        with torch.no_grad():
            q = q * 2
        return head(q, k[0, 0], v[0, 0])

    return torch.vmap(one)(q[0])


def drawn(q, k, v):
    return torch.vmap(lambda q: head(q + 0 * torch.rand_like(q), k[0, 0], v[0, 0]), randomness="different")(q[0])


def in_autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return torch.vmap(lambda q: head(q, k[0, 0], v[0, 0]))(q[0]).float()


def differentiated(q, k, v):
    return torch.func.grad(lambda q: head(q, k[0, 0], v[0, 0]).sum())(q[0, 0]) + head(q[0, 0], k[0, 0], v[0, 0])


LEFT = {
    without_gradients: "another transform or a mode",
    drawn: "draws numbers",
    in_autocast: "autocast",
    differentiated: "function transform",
}


@pytest.mark.parametrize("program", LEFT)
def test_what_leaves_a_graph_whole(program):
    report = harness.run(program, QKV, True)
    assert not report.sites and LEFT[program] in report.refusals[0].reason, [str(r) for r in report.refusals]


def test_inside_of_autocast_from_outside():
    with torch.autocast("cpu", torch.bfloat16), tvcompile.collect() as report:
        q, k, v = (x.detach() for x in QKV)
        program = PROGRAMS["heads"]
        found = torch.compile(program, backend="tv", options=harness.STRICT)(q, k, v)
        expected = program(q, k, v)
    assert found.dtype == expected.dtype == torch.bfloat16 and len(report.sites) == 1
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_a_vmap_beside_an_attention_stays_right():
    def program(q, k, v):
        return torch.vmap(lambda x: x.cumsum(0) * 2)(q), (q @ k.mT * 0.25).softmax(-1) @ v

    assert len(harness.run(program, QKV, True).sites) == 1


def test_without_an_attention_the_program_is_dynamos():
    def program(x):
        return torch.vmap(lambda x: x * 2)(x)

    with tvcompile.collect() as report:
        x = torch.randn(3, 4)
        found = torch.compile(program, backend="tv", options=harness.STRICT)(x)
    torch.testing.assert_close(found, x * 2)
    assert not report.sites and not report.records[0].failed


def test_through_inductor():
    torch._dynamo.reset()
    module = nn.Sequential(Ensemble()).train()
    x = torch.randn(3, 7, H)
    with tvcompile.collect() as report:
        found = torch.compile(module, backend="tv", options={"tv.strict": True})(x)
        found.square().sum().backward()
    torch.testing.assert_close(found, module(x), rtol=1e-4, atol=1e-5)
    assert len(moe_sites(report)) == 1
