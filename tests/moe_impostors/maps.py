"""Rows that a map of experts and tokens chose: other rows, counts, weights than the map's; offsets that are rounded."""

import torch
import torch.nn.functional as F

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.grouped import Grouped, PermutedByAMap


@impostor(ANY)
class CountsOfTheNextExperts(PermutedByAMap):
    def counts(self, sent):
        return sent.sum(0).roll(1)


@impostor(ANY)
class CountsOfOtherTokens(PermutedByAMap):
    """As many rows, but of the expert that mirrors it."""

    def counts(self, sent):
        return sent.flip(1).sum(0)


@impostor(ANY)
class CountsOfHalfTheTokens(PermutedByAMap):
    def counts(self, sent):
        return sent[: sent.shape[0] // 2].sum(0)


@impostor(ANY)
class MirroredMap(PermutedByAMap):
    def mask(self, sent):
        return sent.flip(1).T.contiguous()


@impostor(ANY)
class WeightsOfOtherTokens(PermutedByAMap):
    """Every expert's tokens are those that mirror them, as many."""

    def weighed(self, mask):
        return mask.flip(1)


@impostor(ANY)
class NextTokensRead(PermutedByAMap):
    def read(self, token):
        return (token - 1).clamp(min=0)


class ManyRows(PermutedByAMap):
    """More rows than narrow dtypes count."""

    def experts(self, x, ids, w):
        many = x.repeat(40, 1)
        w, ids = self.route(many)
        return super().experts(many, ids, w)[: x.shape[0]]


@impostor(ANY)
class CountedInBfloat16(ManyRows):
    def offsets(self, sent):
        return sent.sum(0, dtype=torch.bfloat16).cumsum(0, dtype=torch.int64)


@impostor(ANY)
class SummedInBfloat16(ManyRows):
    def offsets(self, sent):
        return self.counts(sent).cumsum(0, dtype=torch.bfloat16)


@impostor(ANY)
class SortedAndSummedInBfloat16(Grouped):
    def experts(self, x, ids, w):
        many = x.repeat(40, 1)
        w, ids = self.route(many)
        ids_g, perm = torch.sort(ids.flatten())
        offsets = F.one_hot(ids_g, self.count).sum(0).cumsum(0, dtype=torch.bfloat16).to(torch.int32)
        rows = self.rows(many[perm // self.top], ids_g, offsets) * w.flatten()[perm, None]
        return torch.zeros_like(many).index_add(0, perm // self.top, rows)[: x.shape[0]]
