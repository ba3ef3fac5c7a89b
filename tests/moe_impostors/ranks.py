"""Near-misses of places by a sort: rows of one expert that share a place, or places of other experts."""

import torch
import torch.nn.functional as F

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.ranks import Sorted


class Ranked(Sorted):
    kind = "gelu"

    def experts(self, x, ids, w):
        flat = ids.reshape(-1)
        order = self.order(flat)
        sorted_ids = flat[order]
        place = self.rows(len(flat)) - self.starts(flat, sorted_ids)[self.of_places(flat, sorted_ids)]
        return self.send(x, order, sorted_ids, place % len(flat), w.reshape(-1)[order])

    def order(self, flat):
        return torch.argsort(flat, stable=True)

    def rows(self, n):
        return torch.arange(n)

    def of_places(self, flat, sorted_ids):
        return sorted_ids


@impostor(ANY)
class SortedDownwards(Ranked):
    def order(self, flat):
        return torch.argsort(flat, descending=True)


@impostor(ANY)
class SortedByOtherIds(Ranked):
    def order(self, flat):
        return torch.argsort(flat.roll(1))


@impostor(ANY)
class StartsOfUnsortedIds(Ranked):
    def of_places(self, flat, sorted_ids):
        return flat


@impostor(ANY)
class StartsOfFewerIds(Ranked):
    def starts(self, ids, sorted_ids):
        counts = torch.bincount(ids[::2], minlength=self.count)
        return counts.cumsum(0) - counts


@impostor(ANY)
class StartsOfTurnedCounts(Ranked):
    def starts(self, ids, sorted_ids):
        return F.pad(torch.bincount(ids, minlength=self.count).flip(0), (1, 0)).cumsum(0)[:-1]


@impostor(ANY)
class StartsAfterAnother(Ranked):
    """The sum begins with one and not with zero: a row of each expert is one of the expert before it."""

    def starts(self, ids, sorted_ids):
        return F.pad(torch.bincount(ids, minlength=self.count), (1, 0), value=1).cumsum(0)[:-1]


@impostor(ANY)
class StartsBeforeTheNext(Ranked):
    """Counts after two zeros."""

    def starts(self, ids, sorted_ids):
        return F.pad(torch.bincount(ids, minlength=self.count), (2, 0)).cumsum(0)[:-2]


@impostor(ANY)
class StartsWhereItEnds(Ranked):
    def starts(self, ids, sorted_ids):
        return F.pad(torch.bincount(ids, minlength=self.count), (1, 0)).cumsum(0)[1:]


@impostor(ANY)
class StartsOfHalf(Ranked):
    """Some rows of an expert have the places of others of its rows."""

    def starts(self, ids, sorted_ids):
        return F.pad(torch.bincount(ids, minlength=self.count), (1, 0)).cumsum(0)[:-1] // 2

    def rows(self, n):
        return torch.arange(n) // 2


@impostor(ANY)
class FirstStartIsNotZero(Ranked):
    def starts(self, ids, sorted_ids):
        counts = torch.bincount(ids, minlength=self.count)
        return torch.cat([counts.new_full((1,), 3), counts.cumsum(0)[:-1]])


@impostor(ANY)
class StartsOfOtherIds(Ranked):
    def starts(self, ids, sorted_ids):
        counts = torch.bincount((ids + 1) % self.count, minlength=self.count)
        return counts.cumsum(0) - counts


@impostor(ANY)
class StartsOfTheNextExpert(Ranked):
    def of_places(self, flat, sorted_ids):
        return (sorted_ids + 1) % self.count


@impostor(ANY)
class EndsLessOtherCounts(Ranked):
    def starts(self, ids, sorted_ids):
        return torch.bincount(ids, minlength=self.count).cumsum(0) - torch.bincount(ids % 2, minlength=self.count)


@impostor(ANY)
class StartsInAnotherOrder(Ranked):
    def starts(self, ids, sorted_ids):
        ends = F.one_hot(ids, self.count).sum(0).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends[[1, 0, 2]]])


@impostor(ANY)
class SentToOtherExperts(Ranked):
    """Rows of two ids share the places of one expert."""

    def send(self, x, order, ids, place, w):
        return super().send(x, order, ids % 2, place, w)


@impostor(ANY)
class EndsForStarts(Ranked):
    def starts(self, ids, sorted_ids):
        return torch.bincount(ids, minlength=self.count).cumsum(0)


@impostor(ANY)
class EveryOtherRow(Ranked):
    """Neighbours share a place."""

    def rows(self, n):
        return torch.arange(n) // 2


@impostor(ANY)
class SearchedFromTheRight(Ranked):
    def starts(self, ids, sorted_ids):
        return torch.searchsorted(sorted_ids, torch.arange(self.count), right=True)
