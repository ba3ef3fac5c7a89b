"""Experts with a capacity: a place for every pair, pairs without a place are dropped."""

import torch
import torch.nn.functional as F

from tests.moe_spellings.base import Block, T, moe


class Capacity(Block):
    """`capacity` places in every expert; earlier tokens first, first choices before second ones."""

    capacity = 5

    def kept(self, ids):
        """bool [T,K]: pairs that find a place."""
        hits = F.one_hot(ids.T.reshape(-1), self.count)
        place = (hits.cumsum(0) * hits).sum(-1) - 1
        return (place < self.capacity).view(self.top, -1).T

    def coefficients(self, x):
        w, ids = self.route(x)
        w = w * self.kept(ids)
        return torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter_add(1, ids, w)

    def places(self, rows):
        """The experts of rows [E,C,H]."""

        def product(x, weight, bias):
            y = torch.einsum("eci,eio->eco" if self.order == "io" else "eci,eoi->eco", x, weight)
            return y if bias is None else y + bias.unsqueeze(1)

        return self.mlp(rows, product)


@moe(router="top1", kind="relu")
@moe(router="top1", order="oi", bias=True)
@moe(router="top1", capacity=T)
class SwitchEinsum(Capacity):
    """Mesh TensorFlow's Switch: dispatch and combine tensors [T,E,C]."""

    top = 1

    def experts(self, x, ids, w):
        mask = F.one_hot(ids.squeeze(-1), self.count)
        place = (torch.cumsum(mask, dim=0) * mask).sum(dim=-1) - 1
        mask = mask * (place < self.capacity).unsqueeze(-1)
        where = F.one_hot(place.clamp(max=self.capacity - 1), self.capacity)
        dispatch = (mask.unsqueeze(-1) * where.unsqueeze(1)).to(x.dtype)
        rows = torch.einsum("tec,th->ech", dispatch, x)
        return torch.einsum("tec,ech->th", dispatch * w.unsqueeze(-1), self.places(rows))


@moe(router="top1", kind="relu")
@moe(router="top1", kind="gelu", bias=True, capacity=3)
class SwitchSlicedOneHot(Capacity):
    """Pairs without a place get one beyond the last, which is cut off."""

    top = 1

    def experts(self, x, ids, w):
        mask, C = F.one_hot(ids.squeeze(-1), self.count), self.capacity
        place = (torch.cumsum(mask, dim=0) * mask).sum(dim=-1) - 1
        where = F.one_hot(place.clamp(max=C), C + 1)[:, :C]
        dispatch = (mask.unsqueeze(-1) * where.unsqueeze(1)).to(x.dtype)
        rows = torch.einsum("tec,th->ech", dispatch, x)
        return torch.einsum("tec,ech->th", dispatch * w.unsqueeze(-1), self.places(rows))


@moe(router="argmax_twice", kind="relu")
@moe(router="argmax_twice", order="oi", layout="separate")
@moe(router="renormalised", capacity=4, kind="gelu", bias=True)
class GShard(Capacity):
    """DeepSpeed's top-2 gating: locations by cumsum, second choices after all first ones."""

    def taken(self, mask1):
        """Places of every expert that first choices ask for."""
        return torch.sum(mask1, dim=0, keepdim=True)

    def experts(self, x, ids, w):
        mask1, mask2 = F.one_hot(ids[:, 0], self.count), F.one_hot(ids[:, 1], self.count)
        locations1 = torch.cumsum(mask1, dim=0) - 1
        locations2 = torch.cumsum(mask2, dim=0) - 1
        locations2 = locations2 + self.taken(mask1)
        mask1 = mask1 * torch.lt(locations1, self.capacity)
        mask2 = mask2 * torch.lt(locations2, self.capacity)
        place1, place2 = torch.sum(locations1 * mask1, dim=1), torch.sum(locations2 * mask2, dim=1)
        gates1 = torch.einsum("s,se->se", w[:, 0], mask1.to(w.dtype))
        gates2 = torch.einsum("s,se->se", w[:, 1], mask2.to(w.dtype))
        where1 = F.one_hot(place1, self.capacity).to(w.dtype)
        where2 = F.one_hot(place2, self.capacity).to(w.dtype)
        combine = torch.einsum("se,sc->sec", gates1, where1) + torch.einsum("se,sc->sec", gates2, where2)
        dispatch = combine.bool().to(x.dtype)
        rows = torch.einsum("sec,sm->ecm", dispatch, x)
        return torch.einsum("sec,ecm->sm", combine.to(x.dtype), self.places(rows))
