"""Rows that a map of experts and tokens chose: other rows, other counts, other weights than the map's."""

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.grouped import PermutedByAMap


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


@impostor(ANY)
class CountedInBfloat16(PermutedByAMap):
    """Offsets of more than 256 rows are rounded."""

    def experts(self, x, ids, w):
        return super().experts(x.repeat(40, 1), ids.repeat(40, 1), w.repeat(40, 1))[: x.shape[0]]

    def counts(self, sent):
        return sent.sum(0).bfloat16()
