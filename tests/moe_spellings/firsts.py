"""Capacity by a slice: of the rows that a mask chose the first ones, as torch.where lists them."""

import torch
import torch.nn.functional as F

from tests.moe_spellings.base import Block, moe


class Firsts(Block):
    """An expert takes the first of its pairs, token by token."""

    capacity = 7

    def limit(self, e):
        return self.capacity

    def places(self, ids):
        """[T,K]: how many pairs of the same expert come before each."""
        hits = F.one_hot(ids, self.count).view(-1, self.count)
        return ((hits.cumsum(0) - 1) * hits).sum(-1).view(ids.shape)

    def coefficients(self, x):
        w, ids = self.route(x)
        limits = torch.tensor([self.limit(e) for e in range(self.count)])
        w = torch.where(self.places(ids) < limits[ids], w, 0.0)
        return torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter_add(1, ids, w)

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = self.first(torch.where(ids == e), e)
            out = out.index_add(0, token, self.expert(x[token], e) * w[token, k, None])
        return out

    def first(self, places, e):
        return (at[: self.limit(e)] for at in places)


@moe()
@moe(own=True, kind="gelu", bias=True)
class TheFirst(Firsts):
    pass


@moe(own=True, kind="relu")
class MoreForSome(Firsts):
    def limit(self, e):
        return 3 + 2 * e


@moe(order="oi")
class OfTheResults(Firsts):
    """All rows are computed, and the first added."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            y = self.expert(x[token], e) * w[token, k, None]
            out = out.index_add(0, token[: self.capacity], y[: self.capacity])
        return out


@moe(kind="gelu")
class ChoiceByChoice(Firsts):
    """First choices come before second ones, in a mask [K,T] of each expert."""

    def places(self, ids):
        return super().places(ids.t()).t()

    def experts(self, x, ids, w):
        out, hits = torch.zeros_like(x), F.one_hot(ids, self.count).permute(2, 1, 0)
        for e in range(self.count):
            k, token = self.first(torch.where(hits[e]), e)
            out.index_add_(0, token, self.expert(x[token], e) * w[token, k].unsqueeze(-1))
        return out


@moe(own=True, kind="gelu")
class OfAMatrix(Firsts):
    """The rows are those of a matrix of weights that are not zero."""

    def experts(self, x, ids, w):
        matrix, out = torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter(1, ids, w), torch.zeros_like(x)
        for e in range(self.count):
            token = matrix[:, e].nonzero().squeeze(1)[: self.capacity]
            out = out.index_add(0, token, self.expert(x[token], e) * matrix[token, e, None])
        return out


@moe(top=1, router="top1")
class TheRestAsItWas(Firsts):
    """One choice: tokens beyond the capacity stay what they were."""

    capacity = 4

    def reference(self, x):
        flat = x.reshape(-1, x.shape[-1])
        kept = self.places(self.route(flat)[1]) < self.capacity
        return torch.where(kept, super().reference(flat), flat).view(x.shape)

    def experts(self, x, ids, w):
        out = x.clone()
        for e in range(self.count):
            token = (ids[:, 0] == e).nonzero(as_tuple=True)[0][: self.capacity]
            out[token] = self.expert(x[token], e) * w[token]
        return out
