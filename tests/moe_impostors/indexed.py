"""Places of a matrix [T,E] that are not those of the token's own experts, or hold more than its weights."""

import torch

from tests.moe_impostors.base import ANY, Loop, impostor
from tests.moe_spellings.indexed import Indexed


class At(Indexed):
    kind = "relu"

    def matrix(self, x, ids, w):
        matrix = self.before(x, w)
        matrix[self.rows(x), self.columns(ids)] = self.values(w)
        return matrix

    def before(self, x, w):
        return torch.zeros(x.shape[0], self.count, dtype=w.dtype)

    def rows(self, x):
        return torch.arange(x.shape[0])[:, None]

    def columns(self, ids):
        return ids

    def values(self, w):
        return w


@impostor(ANY)
class RowsOfOthers(At):
    def rows(self, x):
        return torch.arange(x.shape[0] - 1, -1, -1)[:, None]


@impostor(ANY)
class RowsShifted(At):
    def rows(self, x):
        return (torch.arange(x.shape[0])[:, None] + 1) % x.shape[0]


@impostor(ANY)
class ColumnsFromTheEnd(At):
    """The first expert's number is -1, which is the last's."""

    def columns(self, ids):
        return ids - 1


@impostor(ANY)
class PutIntoOnes(At):
    def before(self, x, w):
        return torch.ones(x.shape[0], self.count, dtype=w.dtype)


@impostor(ANY)
class OneWeightForAllChoices(At):
    def values(self, w):
        return w[:, :1]


class Ones(At):
    """A mask of ones, times the probabilities."""

    def matrix(self, x, ids, w):
        return super().matrix(x, ids, w) * self.gate(x).softmax(-1)

    def values(self, w):
        return 1.0


@impostor(ANY)
class AnotherRowBesideEach(Ones):
    """The first expert's place is set in the token's own row and in another's."""

    def rows(self, x):
        own = torch.arange(x.shape[0])
        return torch.stack([own, own.flip(0)], -1)

    def columns(self, ids):
        return ids[:, :1]


@impostor(ANY)
class AnotherRowBefore(AnotherRowBesideEach):
    def rows(self, x):
        return super().rows(x).mT

    def columns(self, ids):
        return ids[:, 0]


@impostor(ANY)
class PlacesOfThreeDims(Ones):
    def rows(self, x):
        return torch.arange(x.shape[0])[:, None, None]

    def columns(self, ids):
        return ids[:, :, None]


class AtOne(At):
    top, router = 1, "top1"

    def rows(self, x):
        return torch.arange(x.shape[0])

    def columns(self, ids):
        return ids[:, 0]

    def values(self, w):
        return w[:, 0]


@impostor(ANY)
class RowOfAnother(AtOne):
    def rows(self, x):
        return torch.arange(x.shape[0]).flip(0)


@impostor(ANY)
class ColumnFromTheEnd(AtOne):
    def columns(self, ids):
        return ids[:, 0] - 1


@impostor(ANY)
class OnePutIntoOnes(AtOne):
    def before(self, x, w):
        return torch.ones(x.shape[0], self.count, dtype=w.dtype)


@impostor(ANY)
class SetOverAnother(AtOne):
    """The next expert's place is set too, to less."""

    def matrix(self, x, ids, w):
        matrix = super().matrix(x, ids, w)
        matrix[torch.arange(x.shape[0]), (ids[:, 0] + 1) % self.count] = w[:, 0] / 2
        return matrix


@impostor(ANY)
class RowsInAColumnTurned(Loop):
    """The rows of an expert's tokens, last token first."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token = (ids == e).any(-1).nonzero()
            out[token.flip(0)] += self.expert(x[token], e)
        return out


@impostor(ANY)
class OneRowForAll(Loop):
    """What an expert gives for the first token, at all of its tokens."""

    kind, top, router = "relu", 1, "top1"

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            out[self.places((ids[:, 0] == e).nonzero())] = self.expert(x[:1], e)
        return out

    def places(self, token):
        return token[:, 0]


@impostor(ANY)
class OneRowForAllInAColumn(OneRowForAll):
    def places(self, token):
        return token
