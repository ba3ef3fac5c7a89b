"""A matrix [T,E] in which each token sets the places of its experts, by their numbers and its own."""

import torch

from tests.moe_spellings.base import Block, moe


class Indexed(Block):
    """Every expert on every token, times what the matrix holds."""

    def experts(self, x, ids, w):
        matrix, out = self.matrix(x, ids, w), torch.zeros_like(x)
        for e in range(self.count):
            out = out + matrix[..., e, None] * self.expert(x, e)
        return out

    def matrix(self, x, ids, w):
        matrix = torch.zeros(x.shape[0], self.count, dtype=w.dtype)
        matrix[torch.arange(x.shape[0])[:, None], ids] = w
        return matrix


@moe(kind="gelu")
@moe(own=True, router="renormalised")
class SetAtTheIds(Indexed):
    pass


@moe(kind="relu", three=True)
class SetInSequences(Indexed):
    def matrix(self, x, ids, w):
        matrix = torch.zeros(*x.shape[:2], self.count, dtype=w.dtype)
        b, s = torch.arange(x.shape[0])[:, None, None], torch.arange(x.shape[1])[None, :, None]
        return matrix.index_put((b, s, ids), w, accumulate=True)


@moe(order="oi", bias=True)
class OnesAtTheIds(Indexed):
    """A mask of those that are chosen; their rows alone."""

    def experts(self, x, ids, w):
        chosen, out = torch.zeros(x.shape[0], self.count, dtype=torch.bool), torch.zeros_like(x)
        chosen[torch.arange(x.shape[0]).unsqueeze(-1).expand_as(ids), ids] = True
        weights = super().matrix(x, ids, w)
        for e in range(self.count):
            (token,) = torch.where(chosen[:, e])
            out = out.index_add(0, token, self.expert(x[token], e) * weights[token, e, None])
        return out


@moe(top=1, router="top1", kind="relu")
@moe(top=1, router="top1", own=True)
class OnePlaceOfEach(Indexed):
    def matrix(self, x, ids, w):
        matrix = torch.zeros(x.shape[0], self.count, dtype=w.dtype)
        matrix[torch.arange(x.shape[0]), ids[:, 0]] = w[:, 0]
        return matrix


@moe(top=1, router="top1", layout="interleave")
class OneOfEach(Indexed):
    """Whole numbers."""

    def matrix(self, x, ids, w):
        chosen = torch.zeros(x.shape[0], self.count, dtype=torch.long)
        chosen[torch.arange(x.shape[0]), ids[:, 0]] = 1
        return chosen * w


@moe(top=1, router="top1", kind="gelu")
@moe(top=1, router="top1", own=True, bias=True)
class RowsInAColumn(Block):
    """nonzero() as it comes: numbers [n,1], rows [n,1,H]."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token = (ids[:, 0] == e).nonzero()
            out[token, :] = self.expert(x[token, :], e) * w[token]
        return out


@moe(kind="relu")
class RowsInAColumnAdded(Block):
    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token = (ids == e).any(-1).nonzero()
            out[token] += self.expert(x[token], e) * ((ids == e) * w).sum(-1)[token[:, 0], None, None]
        return out
