"""Buffers of places in which rows meet, are replaced, or are read back by other pairs than theirs."""

import torch
import torch.nn.functional as F

from tests.moe_impostors.base import ANY, NOTHING, impostor
from tests.moe_spellings.buffers import Places


class Slots(Places):
    """slot = ids*C + place into a buffer [E*C,H] and back, in parts."""

    kind, adds = "relu", True

    def experts(self, x, ids, w):
        rows, flat, weights = self.pairs(x, ids, w)
        place = self.numbers(flat)
        kept = self.stays(place)
        slot = self.slot(flat, place, kept)
        buffer = self.filled(self.before(x), slot, self.sent(rows, kept, weights))
        y = self.returned(self.places(self.by_expert(buffer)).flatten(0, 1), slot)
        return self.combined(y * self.weight(weights, kept).unsqueeze(-1))

    def by_expert(self, buffer):
        return buffer.view(self.count, self.capacity, -1)

    def stays(self, place):
        return place < self.capacity

    def slot(self, flat, place, kept):
        return flat * self.capacity + place.clamp(max=self.capacity - 1)

    def before(self, x):
        return x.new_zeros(self.count * self.capacity, x.shape[-1])

    def sent(self, rows, kept, weights):
        return rows * kept.unsqueeze(-1)

    def filled(self, buffer, slot, rows):
        return buffer.index_put((slot,), rows, accumulate=self.adds)

    def returned(self, y, slot):
        return y[slot]

    def weight(self, weights, kept):
        return weights * kept


@impostor(ANY)
class RowsMeetInTheLastPlace(Slots):
    """Pairs without a place are added to the last one."""

    def sent(self, rows, kept, weights):
        return rows


@impostor(ANY)
class ZerosReplaceTheLastPlace(Slots):
    """Pairs without a place are zeros, which are assigned to the last one."""

    adds = False


@impostor(ANY)
class PairsWithoutAPlaceReadTheLastOne(Slots):
    def weight(self, weights, kept):
        return weights


@impostor(ANY)
class LightPairsAreNotSent(Slots):
    def sent(self, rows, kept, weights):
        return rows * (kept & (weights > 0.4)).unsqueeze(-1)


@impostor(None)
class LightPairsAreZeros(Slots):
    """What is sent is a tensor [T K,H] with rows of zeros, which go through their experts as others do."""

    adds = False

    def slot(self, flat, place, kept):
        return torch.where(kept, flat * self.capacity + place, self.count * self.capacity)

    def before(self, x):
        return x.new_zeros(self.count * self.capacity + 1, x.shape[-1])

    def by_expert(self, buffer):
        return super().by_expert(buffer[:-1])

    def sent(self, rows, kept, weights):
        return rows * (weights > 0.4).unsqueeze(-1)

    def returned(self, y, slot):
        return torch.cat([y, y.new_zeros(1, y.shape[-1])])[slot]


@impostor(ANY)
class RowsAreScaledAsTheyArePut(Slots):
    kind = "gelu"

    def sent(self, rows, kept, weights):
        return rows * (kept * 2.0).unsqueeze(-1)


@impostor(None)
class RowsAreRoundedAsTheyAreSent(Slots):
    """What is sent is the rounded tensor [T K,H], as it is."""

    def sent(self, rows, kept, weights):
        return super().sent(rows.bfloat16().to(rows.dtype), kept, weights)


@impostor(ANY)
class RowsOfTheNextToken(Slots):
    def sent(self, rows, kept, weights):
        return super().sent(rows[(torch.arange(rows.shape[0]) + 1) % rows.shape[0]], kept, weights)


@impostor(ANY)
class RowsArePutTwice(Slots):
    def filled(self, buffer, slot, rows):
        return buffer.index_add(0, slot, rows).index_add(0, slot, rows)


@impostor(ANY)
class RowsAreAddedWithAFactor(Slots):
    def filled(self, buffer, slot, rows):
        return buffer.index_add(0, slot, rows, alpha=2)


@impostor(ANY)
class TheBufferHoldsOnes(Slots):
    def before(self, x):
        return torch.ones_like(super().before(x))


@impostor(ANY)
class TheBufferHoldsTokens(Slots):
    def before(self, x):
        return x[:1].expand(self.count * self.capacity, -1)


@impostor(ANY)
class ReadsTheSlotOfTheNextPair(Slots):
    def returned(self, y, slot):
        return y[slot.roll(1)]


@impostor(ANY)
class ReadsTheNextSlot(Slots):
    def returned(self, y, slot):
        return y.roll(-1, 0)[slot]


@impostor(ANY)
class ReadsOnePlaceLater(Slots):
    """The last place of an expert is read as the first of the next one."""

    def returned(self, y, slot):
        return y[(slot + 1).clamp(max=y.shape[0] - 1)]


@impostor(ANY)
class OneMoreThanThereIs(Slots):
    """place = C counts as kept: it is the first place of the next expert."""

    def stays(self, place):
        return place <= self.capacity

    def slot(self, flat, place, kept):
        return torch.where(kept, flat * self.capacity + place, self.count * self.capacity + 1)

    def before(self, x):
        return x.new_zeros(self.count * self.capacity + 2, x.shape[-1])

    def by_expert(self, buffer):
        return super().by_expert(buffer[:-2])

    def returned(self, y, slot):
        return torch.cat([y, y.new_zeros(2, y.shape[-1])])[slot]


@impostor(ANY)
class PairsWithoutAPlaceReadOnes(Slots):
    def slot(self, flat, place, kept):
        return torch.where(kept, flat * self.capacity + place, self.count * self.capacity)

    def before(self, x):
        return x.new_zeros(self.count * self.capacity + 1, x.shape[-1])

    def by_expert(self, buffer):
        return super().by_expert(buffer[:-1])

    def returned(self, y, slot):
        return torch.cat([y, self.last(y)])[slot]

    def last(self, y):
        return y.new_ones(1, y.shape[-1])

    def weight(self, weights, kept):
        return weights


@impostor(NOTHING)
class PaddedWithOnes(PairsWithoutAPlaceReadOnes):
    def returned(self, y, slot):
        return F.pad(y, (0, 0, 0, 1), value=1.0)[slot]


@impostor(ANY)
class PaddedInFront(PairsWithoutAPlaceReadOnes):
    """Every pair reads the place before its own."""

    def returned(self, y, slot):
        return F.pad(y, (0, 0, 1, 0))[slot]


@impostor(ANY)
class PairsWithoutAPlaceReadTheFirst(PairsWithoutAPlaceReadOnes):
    def last(self, y):
        return y[:1]


@impostor(ANY)
class PairsWithoutAPlaceReplaceTheFirst(Slots):
    """slot 0 is theirs: what they assign there is zero."""

    adds = False

    def slot(self, flat, place, kept):
        return torch.where(kept, flat * self.capacity + place, 0)


@impostor(ANY)
class PairsWithoutAPlaceReadTheFirstPlace(Slots):
    def slot(self, flat, place, kept):
        return torch.where(kept, flat * self.capacity + place, 0)

    def weight(self, weights, kept):
        return weights


@impostor(ANY)
class PlacesFromTheEnd(Slots):
    """-1 is the last place of the last expert."""

    adds = False

    def slot(self, flat, place, kept):
        return torch.where(kept, flat * self.capacity + place, -1)


@impostor(ANY)
class ReadFromTheEnd(Slots):
    def slot(self, flat, place, kept):
        return torch.where(kept, flat * self.capacity + place, -1)

    def filled(self, buffer, slot, rows):
        return buffer.index_add(0, slot.clamp(min=0), rows)

    def weight(self, weights, kept):
        return weights


@impostor(ANY)
class ZerosHaveExpertsToo(Slots):
    """The place beyond the last goes through its expert, whose bias is no zero."""

    bias = True

    def slot(self, flat, place, kept):
        return flat * (self.capacity + 1) + place.clamp(max=self.capacity)

    def before(self, x):
        return x.new_zeros(self.count * (self.capacity + 1), x.shape[-1])

    def by_expert(self, buffer):
        return buffer.view(self.count, self.capacity + 1, -1)

    def weight(self, weights, kept):
        return weights


@impostor(ANY)
class PlacesOfAnotherOrder(Slots):
    """Counted over pairs in another order than they are put."""

    def numbers(self, flat):
        return super().numbers(flat.view(self.top, -1).T.reshape(-1))


@impostor(ANY)
class PlacesOfTheNextPairsIds(Slots):
    def numbers(self, flat):
        hits = F.one_hot(flat.roll(1), self.count)
        return (hits.cumsum(0) * F.one_hot(flat, self.count)).sum(-1)


@impostor(ANY)
class PlacesOfHalfThePairs(Slots):
    def numbers(self, flat):
        hits = F.one_hot(flat, self.count)
        counted = hits * (torch.arange(flat.shape[0]) % 2)[:, None]
        return ((counted.cumsum(0) - counted) * hits).sum(-1)


@impostor(ANY)
class PlaceMajorReadAsExpertMajor(Slots):
    capacity = 4

    def slot(self, flat, place, kept):
        return place.clamp(max=self.capacity - 1) * self.count + flat


@impostor(ANY)
class FeaturesGoApart(Slots):
    """Odd features go to the place after."""

    capacity = 16  # more than tokens: no place is behind the last

    def stays(self, place):
        return place < self.capacity - 1

    def filled(self, buffer, slot, rows):
        odd = torch.arange(rows.shape[1]) % 2
        return buffer.scatter_add(0, slot[:, None] + odd, rows)


@impostor("rounded to torch.bfloat16")
class PlacesAreRounded(Slots):
    def by_expert(self, buffer):
        return super().by_expert(buffer.bfloat16().to(buffer.dtype))


@impostor(ANY)
class BufferOfCoarserNumbers(Slots):
    def filled(self, buffer, slot, rows):
        return super().filled(buffer.bfloat16(), slot, rows.bfloat16()).to(rows.dtype)


@impostor(ANY)
class MaskedWithoutGradient(Slots):
    """The tokens get no gradient from the experts, though a mask of them says which count."""

    def sent(self, rows, kept, weights):
        with torch.no_grad():
            return super().sent(rows, kept, weights)


@impostor(ANY)
class DispatchWithoutGradient(Slots):
    """The tokens get no gradient from the experts."""

    def filled(self, buffer, slot, rows):
        with torch.no_grad():
            return super().filled(buffer, slot, rows)
