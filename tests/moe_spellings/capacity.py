"""Experts with a capacity: a place for every pair, pairs without a place are dropped."""

import torch
import torch.nn.functional as F

from tests.moe_spellings.base import Block, S, T, moe


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
        if self.own:
            return torch.stack([self.expert(each, e) for e, each in enumerate(self.rows_of_each(rows))])

        def product(x, weight, bias):
            y = torch.einsum("eci,eio->eco" if self.order == "io" else "eci,eoi->eco", x, weight)
            return y if bias is None else y + bias.unsqueeze(1)

        return self.mlp(rows, product)

    def rows_of_each(self, rows):
        return rows.unbind(0)


@moe(router="top1", kind="relu")
@moe(router="top1", order="oi", bias=True)
@moe(router="top1", capacity=T)
@moe(router="top1", own=True, bias=True)
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
        where = F.one_hot(self.at_most(place, C, x), C + 1)[:, :C]
        dispatch = (mask.unsqueeze(-1) * where.unsqueeze(1)).to(x.dtype)
        rows = torch.einsum("tec,th->ech", dispatch, x)
        return torch.einsum("tec,ech->th", dispatch * w.unsqueeze(-1), self.places(rows))

    def at_most(self, place, C, x):
        return place.clamp(max=C)


@moe(router="top1", kind="relu")
@moe(router="top1", own=True, bias=True, capacity=3)
class SwitchSlicedWhere(SwitchSlicedOneHot):
    def at_most(self, place, C, x):
        return torch.where(place < C, place, torch.full_like(place, C))


@moe(router="top1", kind="relu")
class SwitchWithoutPadding(SwitchSlicedOneHot):
    """What is no token takes a place, but is not sent."""

    def coefficients(self, x):
        return super().coefficients(x) * (x[:, :1] > -0.5)

    def at_most(self, place, C, x):
        return torch.where((place < C) & (x[:, 0] > -0.5), place, C)


@moe(kind="relu")
@moe(order="oi", bias=True)
class SwitchByPositiveWeights(Capacity):
    """A token goes where its weight, the greatest probability, is greater than zero."""

    top = 1

    def coefficients(self, x):
        return self.weights(x)[0]

    def weights(self, x):
        """(the weights [T,E] of those who find a place, places)"""
        p, ids = self.gate(x).softmax(-1).max(-1)
        mask = F.one_hot(ids, self.count)
        place = mask.cumsum(0) * mask - mask
        mask = mask * (place < self.capacity)
        return p[:, None] * mask, (place * mask).sum(-1)

    def experts(self, x, ids, w):
        weights, place = self.weights(x)
        where = F.one_hot(place.clamp(max=self.capacity - 1), self.capacity).to(x.dtype)
        combine = weights[:, :, None] * where[:, None, :]
        rows = torch.einsum("sec,sm->ecm", (combine > 0).to(x.dtype), x)
        return torch.einsum("sec,ecm->sm", combine.to(x.dtype), self.places(rows))


@moe(router="argmax_twice", kind="relu")
@moe(router="argmax_twice", order="oi", layout="separate")
@moe(router="renormalised", capacity=4, kind="gelu", bias=True)
@moe(router="argmax_twice", own=True, kind="gelu", bias=True)
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
        dispatch = self.sent(combine).to(x.dtype)
        rows = torch.einsum("sec,sm->ecm", dispatch, x)
        return torch.einsum("sec,ecm->sm", combine.to(x.dtype), self.places(rows))

    def sent(self, combine):
        """Where a token goes to a place."""
        return combine.bool()


@moe(router="argmax_twice", kind="relu")
@moe(router="renormalised", capacity=4, kind="gelu", bias=True)
@moe(router="sigmoid_topk", capacity=4, bias=True)
class GShardByPositiveWeights(GShard):
    def sent(self, combine):
        return combine > 0


@moe(router="argmax_twice", kind="relu")
@moe(router="argmax_twice", kind="gelu", own=True, bias=True, capacity=4)
class GShardWeighedByThoseKept(GShard):
    """DeepSpeed's top-2 as it is: the weights are of the choices that found a place."""

    def choices(self, x, ids):
        """(masks of those kept, their places, their weights), each of first and second choices."""
        masks = F.one_hot(ids[:, 0], self.count), F.one_hot(ids[:, 1], self.count)
        locations = masks[0].cumsum(0) - 1, masks[1].cumsum(0) - 1 + self.taken(masks[0])
        masks = [m * (at < self.capacity) for m, at in zip(masks, locations)]
        places = [(at * m).sum(1) for m, at in zip(masks, locations)]
        p = self.gate(x).softmax(-1)
        return masks, places, self.normed([(p * m).sum(1) for m in masks])

    def normed(self, weights):
        total = (weights[0] + weights[1]).clamp(min=torch.finfo(weights[0].dtype).eps)
        return [w / total for w in weights]

    def coefficients(self, x):
        masks, _, weights = self.choices(x, self.route(x)[1])
        return sum(w[:, None] * m for w, m in zip(weights, masks))

    def experts(self, x, ids, w):
        combine = sum(
            torch.einsum("se,sc->sec", w[:, None] * m, F.one_hot(at, self.capacity).to(w.dtype))
            for m, at, w in zip(*self.choices(x, ids))
        )
        rows = torch.einsum("sec,sm->ecm", combine.bool().to(x.dtype), x)
        return torch.einsum("sec,ecm->sm", combine.to(x.dtype), self.places(rows))


@moe(router="argmax_twice", own=True, kind="relu")
@moe(router="argmax_twice", bias=True, capacity=8)
class GShardWithoutNorm(GShardWeighedByThoseKept):
    def normed(self, weights):
        return weights


@moe(kind="relu")
@moe(order="oi", router="renormalised", capacity=8)
class PairsSummed(Capacity):
    """Dispatch and combine of all pairs [T K,E,C], added up for every token."""

    def experts(self, x, ids, w):
        hits = F.one_hot(ids.T.reshape(-1), self.count)
        place = (hits.cumsum(0) * hits).sum(-1) - 1
        kept = place < self.capacity
        where = F.one_hot(place.clamp(0, self.capacity - 1), self.capacity) * kept[:, None]
        pairs = hits[:, :, None] * where[:, None, :]
        shape = (self.top, -1, self.count, self.capacity)
        combine = (pairs * (w.T.reshape(-1) * kept)[:, None, None]).view(shape).sum(0)
        rows = torch.einsum("tec,th->ech", pairs.view(shape).sum(0).to(x.dtype), x)
        return torch.einsum("tec,ech->th", combine.to(x.dtype), self.places(rows))


@moe(router="argmax_twice", kind="relu")
@moe(router="renormalised", capacity=4, kind="gelu", bias=True)
class GShardAfterThoseKept(GShard):
    """Second choices begin after the first ones that found a place, as in GShard's own algorithm."""

    fewer = 0

    def taken(self, mask1):
        places = torch.cumsum(mask1, dim=0) - 1
        return torch.sum(mask1 * (places < self.capacity - self.fewer), dim=0, keepdim=True)


@moe(kind="relu")
@moe(order="oi", router="renormalised", policy="position", bias=True)
@moe(top=2, capacity=T, policy="position")
@moe(own=True, kind="gelu", bias=True)
@moe(own=True, policy="position", top=2)
class TopKGating(Capacity):
    """DeepSpeed's gating for any number of choices: places are counted in a matrix [T,E] of all of them."""

    top, capacity, policy = 3, 6, "probs"

    def gated(self, x, ids):
        """(weights [T,E], which of them count, places)"""
        gates = self.gate(x).softmax(-1)
        mask = torch.zeros_like(gates).bool().scatter_(1, ids, 1)
        if self.policy == "probs":
            chosen = torch.zeros_like(gates).scatter(1, ids, gates.gather(1, ids))
            best = torch.topk(chosen, k=self.capacity, dim=0, sorted=False).indices
            mask = torch.logical_and(mask, torch.zeros_like(gates).scatter(0, best, 1))
            locations = self.counted(mask).cumsum(0) - 1
        else:
            locations = self.counted(mask).cumsum(0) - 1
            mask = mask * torch.lt(locations, self.capacity)
        weights = gates * mask
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6), mask, locations

    def counted(self, mask):
        return mask

    def coefficients(self, x):
        return self.gated(x, self.route(x)[1])[0]

    def experts(self, x, ids, w):
        weights, mask, locations = self.gated(x, ids)
        where = F.one_hot((locations * mask).clamp(min=0), self.capacity)
        combine = torch.einsum("se,sec->sec", weights, where.to(x.dtype))
        rows = torch.einsum("sec,sm->ecm", self.sent(combine, where).to(x.dtype), x)
        return torch.einsum("sec,ecm->sm", combine, self.places(rows))

    def sent(self, combine, where):
        return combine.bool()


@moe(kind="relu")
@moe(router="renormalised", order="oi", bias=True)
@moe(own=True)
class TopKGatingInFloats(TopKGating):
    """The mask is made of floats and sent as it is."""

    policy = "position"

    def gated(self, x, ids):
        gates = self.gate(x).softmax(-1)
        mask = torch.zeros_like(gates).scatter(1, ids, 1.0).long()
        locations = mask.cumsum(0) - 1
        mask = mask * (locations < self.capacity)
        return gates * mask, mask, locations

    def experts(self, x, ids, w):
        weights, mask, locations = self.gated(x, ids)
        where = F.one_hot((locations * mask).clamp(max=self.capacity - 1), self.capacity).to(x.dtype)
        rows = torch.einsum("sec,sm->ecm", self.dispatched(mask, weights, where).to(x.dtype), x)
        return torch.einsum("sec,ecm->sm", weights.unsqueeze(-1) * where, self.places(rows))

    def dispatched(self, mask, weights, where):
        return mask.unsqueeze(-1) * where


@moe(kind="relu")
@moe(own=True, bias=True)
class NormedAfterDropping(TopKGatingInFloats):
    """The weights of those who found a place add up to 1."""

    def gated(self, x, ids):
        weights, mask, locations = super().gated(x, ids)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6), mask, locations


@moe(kind="relu")
@moe(own=True, bias=True)
class SentByTheNormedWeights(NormedAfterDropping):
    def dispatched(self, mask, weights, where):
        return (weights.unsqueeze(-1) * where).bool()


@moe(kind="relu")
@moe(own=True, kind="gelu", bias=True)
class PlacesCompared(TopKGatingInFloats):
    """Which place it is says a comparison."""

    def gated(self, x, ids):
        gates = self.gate(x).softmax(-1)
        mask = torch.zeros_like(gates).scatter(1, ids, 1.0).long()
        locations = self.counted(mask).cumsum(0) - 1
        mask = mask * (locations >= 0) * (locations < self.capacity)
        return gates * mask, mask, locations

    def experts(self, x, ids, w):
        weights, mask, locations = self.gated(x, ids)
        where = (locations.unsqueeze(-1) == torch.arange(self.capacity)).to(x.dtype)
        rows = torch.einsum("sec,sm->ecm", mask.to(x.dtype).unsqueeze(-1) * where, x)
        return torch.einsum("sec,ecm->sm", weights.unsqueeze(-1) * where, self.places(rows))


@moe(kind="relu")
@moe(own=True, bias=True)
class OneHotsSummed(TopKGatingInFloats):
    """The mask is a sum of one-hots; sent where the weight is positive."""

    def gated(self, x, ids):
        gates, mask = self.gate(x).softmax(-1), F.one_hot(ids, self.count).sum(1)
        locations = mask.cumsum(0) - 1
        mask = mask * (locations < self.capacity)
        return gates * mask, mask, locations

    def dispatched(self, mask, weights, where):
        return weights.unsqueeze(-1) * where > 0


@moe(kind="relu")
@moe(own=True, kind="gelu", bias=True)
class FirstInAnyOrder(Capacity):
    """DeepSpeed's top-1 gating: an order of the tokens says who finds a place."""

    top, capacity = 1, 4

    def kept_mask(self, x):
        gates = self.gate(x).softmax(-1)
        mask = F.one_hot(gates.argmax(-1), self.count)
        order = torch.linspace(1, 2, x.shape[0], dtype=x.dtype).sin()[:, None]
        first = torch.topk(mask * order, k=self.capacity, dim=0)[1]
        return gates, mask * torch.zeros_like(mask).scatter_(0, first, 1)

    def coefficients(self, x):
        gates, mask = self.kept_mask(x)
        return gates * mask

    def experts(self, x, ids, w):
        gates, mask = self.kept_mask(x)
        place = torch.sum((mask.cumsum(0) - 1) * mask, dim=1)
        combine = torch.einsum("se,sc->sec", gates * mask.to(x.dtype), F.one_hot(place, self.capacity).to(x.dtype))
        rows = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x)
        return torch.einsum("sec,ecm->sm", combine, self.places(rows))


@moe(router="argmax_twice", own=True, kind="relu")
@moe(router="argmax_twice", own=True, bias=True, capacity=4)
class GShardByMatrices(GShard):
    """fairseq: both ways a product of matrices, the experts' rows one after the other in one."""

    def experts(self, x, ids, w):
        masks = [F.one_hot(ids[:, k], self.count) for k in range(2)]
        first, second = (m.cumsum(0) - 1 for m in masks)
        second = second + masks[0].sum(0, keepdim=True)
        masks = [m * (at < self.capacity) for m, at in zip(masks, (first, second))]
        combine = 0
        for k, at in enumerate((first, second)):
            gates = w[:, k, None] * masks[k].to(w.dtype)
            where = F.one_hot((at * masks[k]).sum(-1), self.capacity).to(w.dtype)
            combine = combine + torch.bmm(gates.unsqueeze(-1), where.unsqueeze(1))
        E, C = self.count, self.capacity
        rows = torch.mm(combine.bool().to(x.dtype).permute(1, 2, 0).reshape(E * C, -1), x)
        y = torch.cat([self.expert(each, e) for e, each in enumerate(rows.chunk(E))])
        return combine.view(-1, E * C).mm(y)


class Residual(Capacity):
    """The experts' results take the tokens' places; who found none stays as it was."""

    top, router = 1, "top1"

    def experts(self, x, ids, w):
        out, kept = x.clone(), self.kept(ids).squeeze(-1)
        for e in range(self.count):
            at = self.at((ids.squeeze(-1) == e) & kept)
            out[at] = self.expert(x[at], e).to(out.dtype)
        return w * out

    def at(self, mask):
        return mask

    def reference(self, x):
        flat = x.reshape(-1, x.shape[-1])
        w, ids = self.route(flat)
        return super().reference(x) + torch.where(self.kept(ids), 0.0, w * flat).reshape(x.shape)


@moe(kind="relu", own=True)
@moe(order="oi", bias=True)
class MaskedResidual(Residual):
    """Switch of transformers before version 5: next_states[mask] = expert(hidden_states[mask])."""


@moe()
@moe(kind="gelu", capacity=T)
class ListedResidual(Residual):
    def at(self, mask):
        return torch.where(mask)[0]


@moe(own=True, kind="relu")
class OneHotResidual(Residual):
    """By a column of a mask [B,S,E], as the router of Switch gives it, with a capacity for each sequence."""

    three = True

    def kept(self, ids):
        hits = F.one_hot(ids.squeeze(-1), self.count)
        return (hits.cumsum(-2) * hits).sum(-1, keepdim=True) <= self.capacity

    def experts(self, x, ids, w):
        hits = F.one_hot(ids.squeeze(-1), self.count)
        mask = (hits * (hits.cumsum(-2) <= self.capacity)).bool()
        out = x.clone()
        for e in range(self.count):
            out[mask[:, :, e]] = self.expert(x[mask[:, :, e]], e)
        return w * out

    def coefficients(self, x):
        w, ids = self.route(x)
        w = w * self.kept(ids.reshape(-1, S, 1)).reshape(-1, 1)
        return torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter_add(1, ids, w)

    def reference(self, x):
        w, ids = self.route(x)
        return Block.reference(self, x) + torch.where(self.kept(ids), 0.0, w * x)


@moe(router="top1", kind="relu")
@moe(router="top1", order="oi", bias=True, capacity=3)
class SwitchInFloats(Capacity):
    """Masks and places in floats, as ports of Mesh TensorFlow have them."""

    top = 1

    def running(self, mask):
        return torch.cumsum(mask, dim=0)

    def experts(self, x, ids, w):
        mask = F.one_hot(ids.squeeze(-1), self.count).float()
        place = self.running(mask) * mask
        mask = mask * (place <= self.capacity).float()
        where = F.one_hot(((place - 1) * mask).sum(-1).long(), self.capacity).float()
        dispatch = (mask.unsqueeze(-1) * where.unsqueeze(1)).to(x.dtype)
        rows = torch.einsum("tec,th->ech", dispatch, x)
        return torch.einsum("tec,ech->th", dispatch * w.unsqueeze(-1), self.places(rows))


@moe(kind="gelu", bias=True)
@moe(order="oi", layout="separate", capacity=8)
class PairsInFloats(Capacity):
    """All pairs, first choices first, by an exclusive running sum in floats."""

    def experts(self, x, ids, w):
        hits = F.one_hot(ids, self.count).float()
        flat = hits.transpose(0, 1).reshape(-1, self.count)
        place = (flat.cumsum(0) - flat).reshape(self.top, -1, self.count).transpose(0, 1)
        place = (place * hits).sum(-1)
        kept = (place < self.capacity).float()
        where = F.one_hot(place.long().clamp(max=self.capacity - 1), self.capacity).float()
        combine = torch.einsum("tk,tke,tkc->tec", (w * kept).float(), hits, where).to(x.dtype)
        dispatch = torch.einsum("tk,tke,tkc->tec", kept, hits, where).to(x.dtype)
        rows = torch.einsum("tec,th->ech", dispatch, x)
        return torch.einsum("tec,ech->th", combine, self.places(rows))
