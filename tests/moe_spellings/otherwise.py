"""What other families write, by operations that are used more rarely."""

import torch

from tests.moe_spellings.base import Block, moe
from tests.moe_spellings.grouped import Grouped


@moe(own=True)
class ArgwhereIndexAdd(Block):
    """The router scales by a number that index_add takes."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.argwhere(ids == e).unbind(1)
            out.index_add_(0, token, self.expert(x[token], e) * (w[token, k, None] * 0.4), alpha=2.5)
        return out


@moe(order="oi", bias=True)
@moe(kind="softplus")
class ScatterReduce(Block):
    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            y = self.expert(x[token], e) * w[token, k, None]
            out = out.scatter_reduce(0, token[:, None].expand_as(y), y, "sum")
        return out


@moe(kind="gelu", own=True)
class AddcmulOfAll(Block):
    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            c = (w * (ids == e)).sum(-1, keepdim=True)
            out = torch.addcmul(out, c * 2, self.expert(x, e), value=0.5)
        return out


class Searched(Grouped):
    """Offsets by a search in the sorted ids."""

    def experts(self, x, ids, w):
        flat = ids.reshape(-1)
        ids_g, order = torch.sort(flat, stable=True)
        y = self.rows(x[order // self.top], ids_g, self.offsets(flat, ids_g, order).int())
        return torch.zeros_like(x).index_add(0, order // self.top, y * w.reshape(-1, 1)[order])

    def offsets(self, flat, ids_g, order):
        raise NotImplementedError


@moe(dtype=torch.bfloat16)
class SearchedNext(Searched):
    def offsets(self, flat, ids_g, order):
        return torch.searchsorted(ids_g, torch.arange(1, self.count + 1))


@moe(dtype=torch.bfloat16, order="oi")
class SearchedBySide(Searched):
    def offsets(self, flat, ids_g, order):
        return torch.searchsorted(ids_g, torch.arange(self.count), side="right", out_int32=True)


@moe(dtype=torch.bfloat16)
class SearchedBySorter(Searched):
    def offsets(self, flat, ids_g, order):
        return torch.searchsorted(flat, torch.arange(self.count), right=True, sorter=order)


@moe(own=True)
@moe(top=1, router="top1", order="oi")
@moe(kind="gelu", bias=True)
class WeightsByAMaskOfPairs(Block):
    """x[m.any(-1)] beside w[m]: a token has an expert once."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            pairs = ids == e
            token = pairs.any(dim=-1)
            out[token] += self.expert(x[token], e) * w[pairs].unsqueeze(-1)
        return out


@moe(own=True)
@moe(kind="relu", order="oi")
class ABufferPerExpert(Block):
    """Zeros but for the expert's rows, weighed and added."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            mine = (ids == e).any(dim=-1)
            y = torch.zeros_like(x)
            y[mine] = self.expert(x[mine], e)
            out = out + y * (w * (ids == e)).sum(-1, keepdim=True)
        return out


@moe(kind="silu")
class BuffersStacked(Block):
    def experts(self, x, ids, w):
        found = []
        for e in range(self.count):
            token = (ids == e).any(dim=-1).nonzero()[:, 0]
            found.append(torch.zeros_like(x).index_copy(0, token, self.expert(x[token], e)))
        dense = torch.zeros(len(x), self.count, dtype=w.dtype).scatter(1, ids, w)
        return torch.einsum("te,eth->th", dense, torch.stack(found))


@moe(own=True)
class JoinedThenViewed(Block):
    """All results beside each other, as one tensor of all experts."""

    def experts(self, x, ids, w):
        dense = torch.zeros(len(x), self.count, dtype=w.dtype).scatter(1, ids, w)
        y = torch.cat([self.expert(x, e) for e in range(self.count)], -1).view(len(x), self.count, -1)
        return torch.einsum("te,teh->th", dense, y)
