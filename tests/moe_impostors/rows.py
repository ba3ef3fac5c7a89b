"""Rows that are counted wrongly, left out, or scattered to where they do not belong."""

import torch
import torch.nn.functional as F

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.base import Block, H, T
from tests.moe_spellings.grouped import ByCounts, Grouped
from tests.moe_spellings.loops import PairsOneByOne
from tests.moe_spellings.otherwise import Searched


@impostor(ANY)
class CountsEverySecondTwice(ByCounts):
    def counts(self, ids):
        flat = ids.flatten()
        return torch.zeros(self.count, dtype=torch.int64).index_add_(0, flat, torch.arange(len(flat)) % 2 * 2)


@impostor(ANY)
class CountsFromOne(ByCounts):
    """The rows of expert 0 are one more than its tokens."""

    def counts(self, ids):
        counts = torch.zeros(self.count, dtype=torch.int64)
        counts[0] = 1
        return counts.index_put_((ids.view(-1),), torch.tensor(1), accumulate=True)


@impostor(ANY)
class CountsTokensNotChoices(ByCounts):
    """A token with two choices of one expert is counted once: its choices are no topk."""

    def experts(self, x, ids, w):
        columns = x[:, : 2 * self.count].view(-1, self.top, self.count)
        return super().experts(x, columns.argmax(-1), w)

    def counts(self, ids):
        return torch.zeros(ids.shape[0], self.count).scatter(1, ids, 1).long().sum(0)


@impostor(ANY)
class CountsTheFirstChoices(ByCounts):
    def counts(self, ids):
        return F.one_hot(ids, self.count)[:, :1].sum((0, 1))


@impostor(ANY)
class ScatteredByElements(PairsOneByOne):
    """The mask leaves the last feature out: rows are filled with elements of others."""

    def put(self, y, hits, rows):
        return y.masked_scatter(hits.unsqueeze(1) & (torch.arange(y.shape[1]) < y.shape[1] - 1), rows)


@impostor(ANY, shape=(1, H // 2, H))
class ScatteredIntoColumns(PairsOneByOne):
    """T K = H: the mask of pairs is taken for one of features."""

    def put(self, y, hits, rows):
        return y.masked_scatter(hits.unsqueeze(0).expand_as(y), rows)


@impostor(ANY)
class ScatteredFromTheFirstRows(PairsOneByOne):
    """Rows of all of an expert's pairs, for places of the first ones."""

    def put(self, y, hits, rows):
        hits = hits & (torch.arange(len(hits)) < 20)
        return y.masked_scatter(hits.unsqueeze(1).expand_as(y), rows)


@impostor("not all of the sorted rows")
class TheFirstSortedRowsOnly(Grouped):
    def experts(self, x, ids, w):
        ids_g, perm = torch.sort(ids.reshape(-1))
        ids_g, perm = ids_g[: T + 3], perm[: T + 3]
        offsets = F.one_hot(ids.reshape(-1), self.count).sum(0).cumsum(0).clamp(max=T + 3).int()
        counts = torch.histc(ids.reshape(-1).float(), bins=self.count, min=0, max=self.count - 1)
        rows = self.rows(x[perm // self.top], ids_g, self.at_most(counts, offsets)) * w.reshape(-1)[perm][:, None]
        return torch.zeros_like(x).index_add(0, perm // self.top, rows)

    def at_most(self, counts, offsets):
        return offsets


@impostor("not all of the sorted rows")
class TheFirstRowsOfAPermutation(Block):
    """Half of the pairs, in the order of their experts, by gathered weights."""

    def experts(self, x, ids, w):
        perm = ids.reshape(-1).argsort()[:T]
        token, e = perm // self.top, ids.reshape(-1)[perm]
        y = torch.einsum(
            "rf,rfh->rh", self.activate(torch.einsum("rh,rhf->rf", x[token], self.w_up[e])), self.w_down[e]
        )
        return torch.zeros_like(x).index_add(0, token, y * w.reshape(-1)[perm, None])


@impostor("not rows")
class ScatteredIntoOneRow(PairsOneByOne):
    """A base of one row is stretched to all of them."""

    def experts(self, x, ids, w):
        flat, rows = ids.view(-1), x.repeat_interleave(self.top, dim=0)
        y = torch.zeros_like(rows[:1]).masked_scatter(
            (flat == 0)[:, None].expand_as(rows), self.expert(rows[flat == 0], 0)
        )
        for e in range(1, self.count):
            y = self.put(y, flat == e, self.expert(rows[flat == e], e))
        return (y.view(-1, self.top, x.shape[-1]) * w.unsqueeze(-1)).sum(1)

    def put(self, y, hits, rows):
        return y.masked_scatter(hits.unsqueeze(1).expand_as(y), rows)


@impostor(ANY)
class SearchedInUnsortedIds(Searched):
    """A search finds no counts there."""

    def offsets(self, flat, ids_g, order):
        return torch.searchsorted(flat, torch.arange(self.count), right=True)


@impostor(ANY)
class SearchedBySorterOfSortedIds(Searched):
    def offsets(self, flat, ids_g, order):
        return torch.searchsorted(ids_g, torch.arange(self.count), right=True, sorter=order)
