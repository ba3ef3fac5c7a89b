"""Experts with a capacity whose tokens lie in buffers: rows are put into places and read back from them."""

import torch
import torch.nn.functional as F

from tests.moe_spellings.base import B, S, moe
from tests.moe_spellings.capacity import Capacity


class Places(Capacity):
    """Pairs in one row: their ids, places, and whether they are kept; `first` counts choices before tokens."""

    first = True

    def kept(self, ids):
        if self.first:
            return super().kept(ids)
        hits = F.one_hot(ids.reshape(-1), self.count)
        return ((hits.cumsum(0) * hits).sum(-1) <= self.capacity).view(ids.shape)

    def pairs(self, x, ids, w):
        """(rows, ids, weights) of all pairs."""
        if self.first:
            return x.repeat(self.top, 1), ids.T.reshape(-1), w.T.reshape(-1)
        return x.repeat_interleave(self.top, 0), ids.reshape(-1), w.reshape(-1)

    def numbers(self, flat):
        hits = F.one_hot(flat, self.count)
        return ((hits.cumsum(0) - 1) * hits).sum(-1)

    def combined(self, y):
        if self.first:
            return y.view(self.top, -1, y.shape[-1]).sum(0)
        return y.view(-1, self.top, y.shape[-1]).sum(1)


@moe(router="renormalised", bias=True, kind="gelu")
@moe()
@moe(own=True)
class Buffer(Places):
    """Pairs without a place go to a row beyond the last, which is cut off, and read zeros."""

    def experts(self, x, ids, w):
        rows, flat, weights = self.pairs(x, ids, w)
        place, C, E = self.numbers(flat), self.capacity, self.count
        kept = place < C
        slot = torch.where(kept, flat * C + place, E * C)
        buffer = x.new_zeros(E * C + 1, x.shape[-1])
        buffer[slot] = rows
        y = self.places(buffer[:-1].view(E, C, -1)).flatten(0, 1)
        y = torch.cat([y, y.new_zeros(1, x.shape[-1])])[slot]
        return self.combined(y * (weights * kept).unsqueeze(-1))


@moe(own=True, kind="gelu")
class NumbersFromOne(Buffer):
    """One is taken off after the sum over experts."""

    def numbers(self, flat):
        hits = F.one_hot(flat, self.count)
        return (hits.cumsum(0) * hits).sum(-1) - 1


@moe(first=False, bias=True, kind="relu")
@moe(top=1, router="top1", layout="separate")
@moe(own=True, kind="gelu", bias=True)
class IndexAddSelect(Places):
    """Zeros at both ends say all: no weight asks whether its pair was kept."""

    def experts(self, x, ids, w):
        rows, flat, weights = self.pairs(x, ids, w)
        place, C, E = self.numbers(flat), self.capacity, self.count
        slot = (flat * C + place).masked_fill(place >= C, E * C)
        buffer = torch.zeros(E * C + 1, x.shape[-1], dtype=x.dtype).index_add(0, slot, rows)
        y = self.places(buffer[: E * C].reshape(E, C, -1)).view(E * C, -1)
        y = torch.cat([y, torch.zeros_like(y[:1])], dim=0).index_select(0, slot)
        return self.combined(y * weights.unsqueeze(-1))


@moe(kind="relu", bias=True)
@moe(first=False, order="oi")
@moe(own=True, kind="relu")
class ClampedScatterAdd(Places):
    """Pairs without a place have zeros for rows, added to the last place, and read it times zero."""

    def experts(self, x, ids, w):
        rows, flat, weights = self.pairs(x, ids, w)
        place, C, E = self.numbers(flat), self.capacity, self.count
        kept = (place < C).to(x.dtype).unsqueeze(-1)
        slot = (flat * C + place.clamp(max=C - 1)).unsqueeze(-1).expand(-1, x.shape[-1])
        buffer = torch.zeros(E * C, x.shape[-1], dtype=x.dtype).scatter_add(0, slot, rows * kept)
        y = self.places(buffer.view(E, C, -1)).reshape(E * C, -1).gather(0, slot)
        return self.combined(y * kept * weights.unsqueeze(-1))


@moe(first=False, router="renormalised", kind="gelu", bias=True)
@moe(capacity=4)
class IndexPutByTwo(Places):
    """A buffer [E,C,H], by expert and place."""

    def experts(self, x, ids, w):
        rows, flat, weights = self.pairs(x, ids, w)
        place = self.numbers(flat)
        kept = place < self.capacity
        place = place.clamp(max=self.capacity - 1)
        buffer = x.new_zeros(self.count, self.capacity, x.shape[-1])
        buffer = buffer.index_put((flat, place), torch.where(kept[:, None], rows, 0.0), accumulate=True)
        y = self.places(buffer)[flat, place]
        return self.combined(y * torch.where(kept, weights, 0.0)[:, None])


@moe(kind="silu", bias=True)
@moe(first=False, layout="separate")
class PlaceBeyondTheLast(Places):
    """Every expert has one place too many, for pairs without one; they are assigned, [T,K] at a time."""

    def experts(self, x, ids, w):
        _, flat, _ = self.pairs(x, ids, w)
        place, C = self.numbers(flat), self.capacity
        place = place.view(self.top, -1).T if self.first else place.view(-1, self.top)
        buffer = x.new_zeros(self.count, C + 1, x.shape[-1])
        buffer[ids, place.clamp(max=C)] = x.unsqueeze(1)
        y = self.places(buffer[:, :C])
        y = torch.cat([y, y.new_zeros(self.count, 1, y.shape[-1])], dim=1)[ids, place.clamp(max=C)]
        return torch.einsum("tkh,tk->th", y, w)


@moe(top=3, kind="relu", bias=True)
@moe()
class ChoiceAfterChoice(Capacity):
    """Tutel: later choices begin where all earlier ones of their expert end."""

    def experts(self, x, ids, w):
        E, C = self.count, self.capacity
        before, sent, out = 0, x.new_zeros(E * C, x.shape[-1]), torch.zeros_like(x)
        slots, kept = [], []
        for k in range(self.top):
            hits = F.one_hot(ids[:, k], E)
            place = ((torch.cumsum(hits, 0) - 1 + before) * hits).sum(1)
            before = before + hits.sum(0, keepdim=True)
            kept.append((place < C).unsqueeze(-1))
            slots.append(ids[:, k] * C + place.clamp(max=C - 1))
            sent = sent.index_add(0, slots[k], x * kept[k])
        y = self.places(sent.view(E, C, -1)).view(E * C, -1)
        for k in range(self.top):
            out = out + y[slots[k]] * (w[:, k, None] * kept[k])
        return out


@moe(kind="gelu", bias=True)
@moe(router="renormalised", capacity=4)
class OneMaskOfAllChoices(Capacity):
    """nanoMoE: one mask [K,T,E], rows by a boolean matrix."""

    def experts(self, x, ids, w):
        T, E, C = x.shape[0], self.count, self.capacity
        dense = torch.zeros(T, E, dtype=w.dtype).scatter(-1, ids, w)
        mask = F.one_hot(ids, num_classes=E).permute(1, 0, 2)
        rank = (mask.reshape(self.top * T, E).cumsum(0) - 1).reshape(self.top, T, E)
        mask = mask * torch.lt(rank, C)
        rank = torch.sum(mask * rank, dim=-1)
        combine = torch.sum((mask * dense[None]).unsqueeze(3) * F.one_hot(rank, num_classes=C).unsqueeze(2), dim=0)
        rows = combine.bool().permute(1, 2, 0).type_as(x) @ x
        y = self.places(rows)
        return combine.view(T, -1).type_as(x) @ y.view(E * C, -1)


@moe(three=True, router="top1", kind="relu")
@moe(three=True, router="top1", bias=True, kind="gelu")
class SwitchPerSequence(Capacity):
    """Places are counted in every sequence by itself: [B,S,E,C]."""

    top, capacity = 1, 3

    def coefficients(self, x):
        w, ids = self.route(x.view(B, S, -1))
        kept = torch.cat([self.kept(of_sequence) for of_sequence in ids])
        return torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter_add(
            1, ids.flatten(0, 1), w.flatten(0, 1) * kept
        )

    def experts(self, x, ids, w):
        mask = F.one_hot(ids.squeeze(-1), self.count)
        place = (torch.cumsum(mask, dim=1) * mask).sum(dim=-1) - 1
        mask = mask * (place < self.capacity).unsqueeze(-1)
        where = F.one_hot(place.clamp(max=self.capacity - 1), self.capacity)
        dispatch = torch.einsum("bse,bsc->bsec", mask, where).to(x.dtype)
        rows = torch.einsum("bsec,bsh->ebch", dispatch, x)

        def product(x, weight, bias):
            y = torch.einsum("ebci,eio->ebco", x, weight)
            return y if bias is None else y + bias[:, None, None]

        return torch.einsum("bsec,ebch->bsh", dispatch * w.unsqueeze(-1), self.mlp(rows, product))


@moe(kind="relu", bias=True)
class PlaceByGather(Buffer):
    """The running sum is read at the pair's expert, without the pair itself."""

    def numbers(self, flat):
        hits = F.one_hot(flat, self.count)
        return (hits.cumsum(0) - hits).gather(1, flat[:, None]).squeeze(1)


@moe(first=False, kind="relu", bias=True)
class SlotZero(Places):
    """Pairs without a place go to slot 0, as zeros, and read it times zero."""

    def experts(self, x, ids, w):
        rows, flat, weights = self.pairs(x, ids, w)
        place, C, E = self.numbers(flat), self.capacity, self.count
        kept = place < C
        slot = torch.where(kept, flat * C + place, torch.zeros_like(flat))
        buffer = x.new_zeros(E * C, x.shape[-1]).index_add(0, slot, rows * kept[:, None])
        y = self.places(buffer.view(E, C, -1)).flatten(0, 1)[slot]
        return self.combined(y * (weights * kept)[:, None])


@moe(kind="relu", bias=True)
class PlaceMajor(Places):
    """A buffer [C,E,H] of memory that is not set, and one row more."""

    def experts(self, x, ids, w):
        rows, flat, weights = self.pairs(x, ids, w)
        place, C, E = self.numbers(flat), self.capacity, self.count
        slot = torch.where(place < C, place * E + flat, E * C)
        buffer = x.new_empty(E * C + 1, x.shape[-1]).index_copy(0, slot, rows)
        y = self.places(buffer[:-1].view(C, E, -1).transpose(0, 1)).transpose(0, 1).reshape(E * C, -1)
        return self.combined(F.pad(y, (0, 0, 0, 1))[slot] * weights[:, None])


@moe(kind="relu", bias=True)
@moe(first=False)
class OnlyWhatIsKept(Places):
    """Pairs without a place are left out of the rows."""

    def experts(self, x, ids, w):
        token = torch.arange(x.shape[0])
        token = token.repeat(self.top) if self.first else token.repeat_interleave(self.top)
        _, flat, weights = self.pairs(x, ids, w)
        place = self.numbers(flat)
        kept = place < self.capacity
        token, flat, place, weights = token[kept], flat[kept], place[kept], weights[kept]
        buffer = x.new_zeros(self.count, self.capacity, x.shape[-1])
        buffer[flat, place] = x[token]
        y = self.places(buffer)[flat, place] * weights.unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, y)
