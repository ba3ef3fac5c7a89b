"""Loops over the experts whose rows a condition says: on a matrix of weights, on any of the ids, on places."""

import torch
import torch.nn.functional as F

from tests.moe_spellings.base import Block, H, moe


class FromAMatrix(Block):
    """The rows of an expert are those where a condition on a matrix [T,E] of what was scattered holds."""

    def coefficients(self, x):
        w, ids = self.route(x)
        matrix = self.matrix(x, ids, w)
        return torch.where(self.counts(matrix), matrix, 0.0)

    def matrix(self, x, ids, w):
        return torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter(1, ids, w)

    def experts(self, x, ids, w):
        matrix, out = self.matrix(x, ids, w), torch.zeros_like(x)
        counts = self.counts(matrix)
        for e in range(self.count):
            (token,) = torch.where(counts[:, e])
            out = out.index_add(0, token, self.expert(x[token], e) * matrix[token, e, None])
        return out


@moe()
@moe(own=True, kind="gelu", bias=True)
@moe(top=1, router="top1")
class AboveAThreshold(FromAMatrix):
    def counts(self, matrix):
        return matrix > 0.3


@moe(top=1, router="top1")
class OneChoiceAboveAThreshold(Block):
    """Added in place: no token is there twice, as each has one choice."""

    def coefficients(self, x):
        w, ids = self.route(x)
        return torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter(1, ids, torch.where(w > 0.3, w, 0.0))

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where((ids == e) & (w > 0.3))
            out[token] += self.expert(x[token], e) * w[token, k, None]
        return out


@moe()
@moe(kind="relu", order="oi")
class FirstOnes(FromAMatrix):
    """The first tokens of each expert, counted in the matrix."""

    def counts(self, matrix):
        sent = (matrix != 0).to(matrix.dtype)
        return sent * (sent.cumsum(0) <= 6) > 0


@moe()
class PositiveLogits(FromAMatrix):
    """Weights of both signs, of which one counts."""

    def route(self, x):
        return torch.topk(self.gate(x), self.top, dim=-1)

    def counts(self, matrix):
        return matrix > 0


class AllProbabilities(Block):
    """The weights are the router's probabilities of all experts, of which ids say those that count."""

    def coefficients(self, x):
        probabilities = self.gate(x).softmax(-1)
        ids = probabilities.topk(self.top, -1).indices
        return probabilities * F.one_hot(ids, self.count).sum(1)

    def forward(self, x):
        flat = x.reshape(-1, H)
        probabilities = self.gate(flat).softmax(-1)
        ids = probabilities.topk(self.top, -1).indices
        out = torch.zeros_like(flat)
        for e in range(self.count):
            out = self.add(out, flat, e, ids == e, probabilities)
        return out.view(x.shape)


@moe()
@moe(own=True, kind="gelu", bias=True)
class AnyOfTheIds(AllProbabilities):
    def add(self, out, x, e, hits, probabilities):
        mask = hits.any(-1)
        out[mask] += probabilities[mask, e].unsqueeze(-1) * self.expert(x[mask], e)
        return out


@moe(order="oi")
class SumOfTheHits(AllProbabilities):
    def add(self, out, x, e, hits, probabilities):
        token = (hits.sum(-1) > 0).nonzero().squeeze(1)
        return out.index_add(0, token, probabilities[token, e].unsqueeze(-1) * self.expert(x[token], e))


@moe(kind="relu")
class AnyOfTheIdsDense(AllProbabilities):
    def add(self, out, x, e, hits, probabilities):
        y = probabilities[:, e : e + 1] * self.expert(x, e)
        return out + torch.where(hits.any(-1, keepdim=True), y, 0.0)


@moe()
@moe(own=True)
class DroppedAsMinusOne(Block):
    """Pairs beyond the capacity have no expert's number."""

    capacity = 7

    def kept(self, ids):
        hits = F.one_hot(ids, self.count).view(-1, self.count)
        place = (hits.cumsum(0) * hits).sum(-1).view(ids.shape)
        return place <= self.capacity

    def coefficients(self, x):
        w, ids = self.route(x)
        w = torch.where(self.kept(ids), w, 0.0)
        return torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter_add(1, ids, w)

    def experts(self, x, ids, w):
        ids, out = torch.where(self.kept(ids), ids, -1), torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out = out.index_add(0, token, self.expert(x[token], e) * w[token, k, None])
        return out


class NotZero(FromAMatrix):
    def counts(self, matrix):
        return matrix != 0


@moe(modes=("train",))
class ZeroWeightsDoNotLearn(NotZero):
    """A weight that is exactly 0 gets no gradient from an expert that was not asked."""

    def route(self, x):
        w, ids = torch.topk(self.gate(x), self.top, dim=-1)
        return w * (torch.arange(x.shape[0]) % 2)[:, None], ids


@moe(kind="relu", modes=("train",))
class SharesOfNothing(NotZero):
    """Weights are divided by their sum, which may be 0: there is none then."""

    def route(self, x):
        return torch.topk((self.gate(x) - 0.5).relu(), self.top, dim=-1)

    def coefficients(self, x):
        c = super().coefficients(x)
        return torch.where(c > 0, c / c.sum(-1, keepdim=True), 0.0)

    def experts(self, x, ids, w):
        matrix, out = self.matrix(x, ids, w), torch.zeros_like(x)
        total = matrix.sum(-1)
        for e in range(self.count):
            (token,) = torch.where(matrix[:, e] > 0)
            y = self.expert(x[token], e) * (matrix[token, e] / total[token])[:, None]
            out = out.index_add(0, token, y)
        return out


class SumOrMore(Block):
    """The sum with a result, or as it was, from all results."""

    def experts(self, x, ids, w):
        results, out = [self.expert(x, e) for e in range(self.count)], torch.zeros_like(x)
        for e, y in enumerate(results):
            out = self.either(ids, e, out, y * self.of_expert(ids, w, e))
        return out

    def of_expert(self, ids, w, e):
        return ((ids == e) * w).sum(-1, keepdim=True)

    def either(self, ids, e, out, y):
        return torch.where((ids == e).any(-1, keepdim=True), out + y, out)


@moe(kind="gelu")
@moe(own=True, layout="separate", top=1, router="top1")
class MoreWhereItIsChosen(SumOrMore):
    pass


@moe(kind="relu", bias=True)
class AsItWasWhereItIsNot(SumOrMore):
    def either(self, ids, e, out, y):
        return torch.where((ids != e).all(-1)[:, None], out, y + out)


@moe()
class MoreChoiceByChoice(SumOrMore):
    def experts(self, x, ids, w):
        results, out = [self.expert(x, e) for e in range(self.count)], torch.zeros_like(x)
        for k in range(self.top):
            for e in range(self.count):
                out = torch.where(ids[:, k, None] == e, out + w[:, k, None] * results[e], out)
        return out
