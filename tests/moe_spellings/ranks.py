"""Capacity by a sort: the place of a pair is how many rows its expert has before it."""

import torch
import torch.nn.functional as F

from tests.moe_spellings.base import moe
from tests.moe_spellings.capacity import Capacity


class Sorted(Capacity):
    """`pairs` says which pairs there are in sorted order, `send` computes the experts' places."""

    capacity = 6

    def kept(self, ids):
        hits = F.one_hot(ids.reshape(-1), self.count)
        return ((hits.cumsum(0) * hits).sum(-1) <= self.capacity).view(ids.shape)

    def starts(self, ids, sorted_ids):
        counts = torch.bincount(ids, minlength=self.count)
        return counts.cumsum(0) - counts

    def experts(self, x, ids, w):
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        sorted_ids = flat[order]
        place = torch.arange(len(flat)) - self.starts(flat, sorted_ids)[sorted_ids]
        return self.send(x, order, sorted_ids, place, w.reshape(-1)[order])

    def send(self, x, order, ids, place, w):
        """Pairs beyond the last place go to one more, which is left out."""
        kept, C, token = place < self.capacity, self.capacity, order // self.top
        slot = torch.where(kept, ids * C + place, self.count * C)
        rows = x.new_zeros(self.count * C + 1, x.shape[1]).index_put((slot,), x[token])
        y = self.places(rows[:-1].view(self.count, C, -1)).flatten(0, 1)
        y = torch.cat([y, y.new_zeros(1, x.shape[1])])
        return torch.zeros_like(x).index_add(0, token, y[slot] * (w * kept)[:, None])


@moe(kind="relu")
@moe(order="oi", bias=True)
@moe(own=True, capacity=4)
class LessItsCounts(Sorted):
    pass


@moe(kind="gelu")
@moe(own=True, bias=True)
class PaddedSums(Sorted):
    def starts(self, ids, sorted_ids):
        return F.pad(F.one_hot(ids, self.count).sum(0).cumsum(0), (1, 0))[:-1]

    def send(self, x, order, ids, place, w):
        """Only what is kept."""
        kept = place < self.capacity
        ids, place, token = ids[kept], place[kept], order[kept] // self.top
        rows = x.new_zeros(self.count, self.capacity, x.shape[1])
        rows[ids, place] = x[token]
        return torch.zeros_like(x).index_add(0, token, self.places(rows)[ids, place] * w[kept][:, None])


@moe(kind="relu")
@moe(own=True, layout="separate")
class SumsOfPadded(Sorted):
    """The zero is put before the counts, not before their sums."""

    def starts(self, ids, sorted_ids):
        return F.pad(torch.bincount(ids, minlength=self.count), (1, 0)).cumsum(0)[:-1]


@moe(kind="gelu", order="oi")
class SumsOfAllButTheLast(Sorted):
    def starts(self, ids, sorted_ids):
        counts = torch.histc(ids.float(), bins=self.count, min=0, max=self.count - 1).long()
        return torch.cat([counts.new_zeros(1), counts[:-1]]).cumsum(0)


@moe(bias=True)
class AllStarts(Sorted):
    """One more, where the last expert ends; written into zeros."""

    def starts(self, ids, sorted_ids):
        starts = torch.zeros(self.count + 1, dtype=torch.long)
        starts[1:] = F.one_hot(ids, self.count).sum(0).cumsum(0)
        return starts


@moe(layout="interleave")
class Searched(Sorted):
    def starts(self, ids, sorted_ids):
        return torch.searchsorted(sorted_ids, torch.arange(self.count))

    def send(self, x, order, ids, place, w):
        """Added: what has no place adds zeros."""
        kept, at, token = place < self.capacity, place.clamp(max=self.capacity - 1), order // self.top
        rows = x.new_zeros(self.count, self.capacity, x.shape[1])
        rows = rows.index_put((ids, at), x[token] * kept[:, None], accumulate=True)
        return torch.zeros_like(x).index_add(0, token, self.places(rows)[ids, at] * (w * kept)[:, None])


@moe(kind="relu", bias=True)
class BeforeTheSort(Sorted):
    """The places are put back in the order of the pairs."""

    def experts(self, x, ids, w):
        flat, C = ids.reshape(-1), self.capacity
        sorted_ids, order = flat.sort(stable=True)
        place = torch.arange(len(flat)) - self.starts(flat, sorted_ids)[sorted_ids]
        place = torch.zeros_like(place).scatter(0, order, place)
        kept = place < C
        slot = torch.where(kept, flat * C + place, self.count * C)
        rows = x.new_zeros(self.count * C + 1, x.shape[1]).index_add(0, slot, x.repeat_interleave(self.top, 0))
        y = self.places(rows[:-1].view(self.count, C, -1)).flatten(0, 1)
        y = torch.cat([y, y.new_zeros(1, x.shape[1])])[slot]
        return (y.view(*w.shape, -1) * (w * kept.view(w.shape))[..., None]).sum(1)
