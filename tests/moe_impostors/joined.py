"""Joined rows that are not in the order that they are added in."""

import torch

from tests.moe_impostors.base import impostor
from tests.moe_spellings.joined import Lists, Sorted


@impostor(None)
class Descending(Sorted):
    """Parts are joined from the first expert on, rows lie from the last one on."""

    def sorted(self, ids):
        order = ids.flatten().argsort(descending=True, stable=True)
        return order, ids.flatten()[order]


@impostor(None)
class Flipped(Sorted):
    def sorted(self, ids):
        order, ids = super().sorted(ids)
        return order.flip(0), ids.flip(0)


@impostor(None)
class NotSorted(Sorted):
    def sorted(self, ids):
        return torch.arange(ids.numel()), ids.flatten()


@impostor(None)
class SortedByOthers(Sorted):
    def sorted(self, ids):
        return ids.flip(0).flatten().argsort(stable=True), ids.flatten()


class OtherMasks(Sorted):
    """All rows are in some part, so that their number is right."""

    def experts(self, x, ids, w):
        order, ids = self.sorted(ids)
        token = order // self.top
        rows = x[token]
        y = torch.cat([self.expert(rows[m], e) for e, m in self.numbered(ids)])
        return torch.zeros_like(x).index_add(0, token, y * w.flatten()[order, None])


@impostor(None)
class LastExpertFirst(OtherMasks):
    def numbered(self, ids):
        return [(e, ids == e) for e in reversed(range(self.count))]


@impostor(None)
class FromMinusOne(OtherMasks):
    """Ids less one: the first rows have none, and the masks leave them out of place."""

    def numbered(self, ids):
        return [(0, ids - 1 == 0), (1, ids - 1 == 1), (2, ids - 1 == 2), (3, ids - 1 == -1)]


@impostor(None)
class WithoutTheFirst(Sorted):
    """Ids of -1, as a table gives them, are sorted before all parts: row r is no row r of the parts."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Buffer(torch.tensor([2, -1, 0, 1]))

    def experts(self, x, ids, w):
        order, ids = self.sorted(self.table[ids])
        valid = ids >= 0
        token, rows = (order // self.top)[valid], x[order // self.top]
        y = torch.cat([self.expert(rows[m], e) for e, m in enumerate(self.masks(ids))])
        return torch.zeros_like(x).index_add(0, token, y * w.flatten()[order][valid, None])


@impostor(None)
class TokensOfOthers(Lists):
    def experts(self, x, ids, w):
        tokens, results = [], []
        for e in range(self.count):
            token, _ = (ids == e).nonzero(as_tuple=True)
            tokens.insert(0, token)
            results.append(self.expert(x[token], e))
        return torch.zeros_like(x).index_add(0, torch.cat(tokens), torch.cat(results))
