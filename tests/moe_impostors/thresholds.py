"""Conditions that are not an expert's own, and results that several conditions put in one place."""

import torch

from tests.moe_impostors.base import impostor
from tests.moe_spellings.thresholds import Gates


class Thresholds(Gates):
    own = True

    def weighed(self, x, gates):
        out = torch.zeros_like(x)
        for e in range(self.count):
            out = out + self.kept(gates[:, e : e + 1]) * self.expert(x, e)
        return out


@impostor("no comparison with the ids")
class OneConditionForAll(Thresholds):
    def weighed(self, x, gates):
        return sum(self.expert(x, e) for e in range(self.count)) * self.kept(gates[:, :1])


@impostor("no comparison with the ids")
class OneConditionForAllOfAStack(Gates):
    kind = "gelu"

    def weighed(self, x, gates):
        y = self.mlp(x.expand(self.count, *x.shape), lambda x, W, b: x @ W)
        return torch.einsum("te,eth->th", gates, y) * self.kept(gates[:, :1])


@impostor("no comparison with the ids")
class ByTheTokensPlace(Thresholds):
    """The first tokens go to one expert: no data says so."""

    def weighed(self, x, gates):
        first = torch.arange(x.shape[0])[:, None] < 10
        return torch.where(first, self.expert(x, 0), self.expert(x, 1))


@impostor("conditions of several experts may hold")
class PutOverEachOther(Thresholds):
    def weighed(self, x, gates):
        out = torch.zeros_like(x)
        for e in range(self.count):
            mask = self.kept(gates[:, e])
            out[mask] = self.expert(x[mask], e)
        return out


@impostor("replaced where there may be none")
class PutWithZeros(Thresholds):
    """What is put where the other expert's are is zero there."""

    def weighed(self, x, gates):
        out, first, second = torch.zeros_like(x), *self.kept(gates)[:, :2].unbind(1)
        out[first] = self.expert(x[first], 0)
        out[second] = self.expert(x[second], 1) * ~first[second, None]
        return out


@impostor("conditions of several experts may hold")
class ClearedInsideWhereItIsPut(Gates):
    """The second expert's features are cleared where the first one's result is, which they take the place of."""

    kind = "gelu"

    def weighed(self, x, gates):
        out, first, second = torch.zeros_like(x), *self.kept(gates)[:, :2].unbind(1)
        out[first] = self.expert(x[first], 0)
        hidden = self.activate(self.linear(x[second], "up", 1)) * ~first[second, None]
        out[second] = self.linear(hidden, "down", 1)
        return out


@impostor("replace a part of what is not zero")
class PutOverTheTokens(Thresholds):
    def weighed(self, x, gates):
        out, mask = x.clone(), self.kept(gates[:, 0])
        out[mask] = self.expert(x[mask], 0)
        out[~mask] = self.expert(x[~mask], 1)
        return out


@impostor("tells the tokens of each of 9 experts")
class RowsOfMany(Thresholds):
    """Each token would hold rows of all experts, where the loop holds those of its own."""

    count = 9

    def weighed(self, x, gates):
        out = torch.zeros_like(x)
        for e in range(self.count):
            (token,) = torch.where(gates[:, e] > 0.9)
            out = out.index_add(0, token, self.expert(x[token], e))
        return out


@impostor(None)
class TheOthersGate(Thresholds):
    def kept(self, gates):
        return gates.flip(0) > 0.5


@impostor(None)
class OneExpertAboveTwoThresholds(Thresholds):
    def weighed(self, x, gates):
        return (gates[:, :1] > 0.4) * self.expert(x, 0) + (gates[:, 1:2] > 0.6) * self.expert(x, 0)


@impostor("depends on what it computes")
class ByItsOwnSign(Thresholds):
    def weighed(self, x, gates):
        results = [self.expert(x, e) for e in range(self.count)]
        return sum(torch.where(y.sum(-1, keepdim=True) > 0, y, 0.0) for y in results)


@impostor(None)
class ThresholdsThatDiffer(Thresholds):
    def weighed(self, x, gates):
        return sum((e + 1) * (gates[:, e : e + 1] > 0.2 * e) * self.expert(x, e) for e in range(self.count))


@impostor(None)
class ASharedExpertToo(Thresholds):
    def weighed(self, x, gates):
        return sum((gates[:, e : e + 1] > 0.5) * self.expert(x, e) for e in range(3)) + self.expert(x, 3)
