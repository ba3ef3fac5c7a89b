"""Experts with a rule of their own: which tokens count, what they read, what their results are multiplied by."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.moe_spellings.base import FF, Block, H, moe


class OwnRule(Block):
    """A where-loop: `hits` says which pairs count, `weight` what a result is multiplied by."""

    def hits(self, ids, w, e):
        return ids == e

    def weight(self, w, e):
        return w

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(self.hits(ids, w, e))
            out.index_add_(0, token, self.expert(x[token], e) * self.weight(w[token, k, None], e))
        return out

    def coefficients(self, x):
        w, ids = self.route(x)
        return torch.stack([(self.weight(w, e) * self.hits(ids, w, e)).sum(-1) for e in range(self.count)], -1)


@moe(own=True)
@moe(order="oi", bias=True)
class ANumberOfItsOwn(OwnRule):
    def weight(self, w, e):
        return w * (0.1, 1.0, -0.3, 2.0)[e]


@moe(kind="gelu")
class SquaredForSome(OwnRule):
    def weight(self, w, e):
        return w if e < 2 else w * w


@moe(own=True)
class AParameterOfItsOwn(OwnRule):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.randn(1)) for _ in range(self.count))

    def weight(self, w, e):
        return w * self.scales[e]


@moe(kind="relu")
@moe(own=True, bias=True)
class OneAsksForMore(OwnRule):
    """The last expert counts where its weight is large."""

    def hits(self, ids, w, e):
        return (ids == e) & (w > 0.2) if e == self.count - 1 else ids == e


@moe(own=True)
class WeighedTwice(OwnRule):
    """Each expert is added two times, with two weights."""

    def experts(self, x, ids, w):
        return super().experts(x, ids, w) + super().experts(x, ids, w * w * 0.5)

    def weight(self, w, e):
        return w * (1 + e)

    def coefficients(self, x):
        w, ids = self.route(x)
        hits = torch.stack([((w + 0.5 * w * w) * (1 + e) * (ids == e)).sum(-1) for e in range(self.count)], -1)
        return hits


@moe(order="oi")
class RoomOfItsOwn(OwnRule):
    """Each expert has its own number of places in each column of choices."""

    def hits(self, ids, w, e):
        hits = ids == e
        return hits & (hits.cumsum(0) <= (7 if e == 2 else 3))


@moe(own=True)
class RoomInAMask(Block):
    """The first tokens that have an expert, in a mask of tokens."""

    room = 5

    def first(self, ids, e):
        mine = (ids == e).any(-1)
        return mine & (mine.cumsum(0) <= self.room)

    def experts(self, x, ids, w):
        matrix, out = x.new_zeros(x.shape[0], self.count).scatter(1, ids, w), torch.zeros_like(x)
        for e in range(self.count):
            token = self.first(ids, e).nonzero()[:, 0]
            out.index_add_(0, token, self.expert(x[token], e) * matrix[token, e, None])
        return out

    def coefficients(self, x):
        ids = self.route(x)[1]
        return super().coefficients(x) * torch.stack([self.first(ids, e) for e in range(self.count)], -1)


@moe(kind="gelu", own=True)
@moe(order="oi", bias=True)
class AnySpelledOut(Block):
    """Whether any choice of a token is an expert: a sum, or each choice by its name."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            pairs = ids == e
            mine = pairs.float().sum(-1) > 0 if e % 2 else (ids[:, 0] == e) | (ids[:, 1] == e)
            out[mine] += self.expert(x[mine], e) * w[pairs][:, None]
        return out


@moe(bias=True)
@moe(own=True, kind="gelu", clear="where")
@moe(order="oi", clear="fill")
class ClearedBefore(Block):
    """All tokens go through every expert; those of others are cleared before."""

    clear = "times"

    def cleared(self, x, mine):
        if self.clear == "where":
            return torch.where(mine, x, torch.zeros_like(x))
        return x.masked_fill(~mine, 0.0) if self.clear == "fill" else x * mine

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            pairs = ids == e
            out = out + self.expert(self.cleared(x, pairs.any(-1, keepdim=True)), e) * (w * pairs).sum(-1, keepdim=True)
        return out


class GroupAndPlace(Block):
    """The greatest group, then two of its places."""

    def route(self, x):
        p = self.gate(x).softmax(-1).unflatten(-1, (2, 2))
        group = p.amax(-1).argmax(-1, keepdim=True)
        w, place = p.gather(-2, group[..., None].expand(*group.shape, 2)).squeeze(-2).topk(self.top, -1)
        return w, group * 2 + place


@moe(kind="relu")
@moe(own=True)
class GroupAndPlaceLoop(GroupAndPlace):
    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token], e) * w[token, k, None])
        return out


@moe(kind="gelu", bias=True)
@moe(layout="separate", top=1)
class GroupAndPlaceGathered(GroupAndPlace):
    def experts(self, x, ids, w):
        def product(x, weight, bias):
            y = torch.einsum("tki,tkio->tko", x, weight[ids])
            return y if bias is None else y + bias[ids]

        return (self.mlp(x[:, None].expand(-1, self.top, -1), product) * w[..., None]).sum(1)


class OneParameter(Block):
    """Gate, up and down of an expert in one tensor."""

    def __init__(self):
        super().__init__()
        del self.w_up, self.w_gate, self.w_down
        self.w_all = nn.Parameter(torch.randn(*self.shape_of_all()) / H**0.5)

    layout = "separate"

    def shape_of_all(self):
        return self.count, 3, H, FF

    def weights(self, e):
        gate, up, down = self.w_all[e]
        return gate, up, down.mT

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            gate, up, down = self.weights(e)
            y = (F.silu(x[token] @ gate) * (x[token] @ up)) @ down
            out.index_add_(0, token, y * w[token, k, None])
        return out

    def parts_of(self, e):
        return [(weight, 0.0) for weight in self.weights(e)]


@moe()
class OneParameterOfAll(OneParameter):
    pass


@moe()
class OneParameterByRole(OneParameter):
    def shape_of_all(self):
        return 3, self.count, H, FF

    def weights(self, e):
        gate, up, down = self.w_all[:, e]
        return gate, up, down.mT


@moe()
class OneFlatParameter(OneParameter):
    def shape_of_all(self):
        return self.count, 3 * H * FF

    def weights(self, e):
        gate, up, down = self.w_all[e].chunk(3)
        return gate.view(H, FF), up.view(H, FF), down.view(FF, H)
