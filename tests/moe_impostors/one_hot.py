"""Sums over something that is no one-hot of the ids, or of other ids."""

import torch
import torch.nn.functional as F

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.base import Block
from tests.moe_spellings.capacity import Capacity, GShardWeighedByThoseKept, SwitchSlicedOneHot


class OneHot(Block):
    """Top-1 by one-hots, in parts."""

    top, router, kind = 1, "top1", "relu"

    def experts(self, x, ids, w):
        up, down = self.hots(x, ids[:, 0], w)
        h = torch.einsum("te,ti,eio->to", up, x, self.w_up).relu()
        return torch.einsum("te,ti,eio->to", down, h, self.w_down) * w

    def hots(self, x, ids, w):
        hot = self.hot(x, ids)
        return hot, hot

    def hot(self, x, ids):
        return F.one_hot(ids, self.count).to(x.dtype)


@impostor(ANY)
class OtherExpertsBelow(OneHot):
    def hots(self, x, ids, w):
        return self.hot(x, ids), self.hot(x, ids.flip(0))


@impostor(ANY)
class NextExpertsBelow(OneHot):
    def hots(self, x, ids, w):
        return self.hot(x, ids), self.hot(x, (ids + 1) % self.count)


@impostor(ANY)
class IdsBeyondTheLast(OneHot):
    """The last expert's tokens get none."""

    def hot(self, x, ids):
        return (ids[:, None] + 1 == torch.arange(self.count)).to(x.dtype)


@impostor(ANY)
class WeighedBelowTheActivation(OneHot):
    def hots(self, x, ids, w):
        return self.hot(x, ids) * w, self.hot(x, ids)


@impostor(ANY)
class TwoOnes(OneHot):
    def hot(self, x, ids):
        return super().hot(x, ids) + super().hot(x, ids.flip(0))


@impostor(ANY)
class TwosInstead(OneHot):
    def hot(self, x, ids):
        return 2 * super().hot(x, ids)


@impostor(ANY)
class SetToTwo(OneHot):
    def hot(self, x, ids):
        return x.new_zeros(x.shape[0], self.count).scatter(1, ids[:, None], 2.0)


@impostor(ANY)
class SetInOnes(OneHot):
    def hot(self, x, ids):
        return x.new_ones(x.shape[0], self.count).scatter(1, ids[:, None], 1.0)


@impostor(ANY)
class AllButOne(OneHot):
    def hot(self, x, ids):
        return 1 - super().hot(x, ids)


@impostor(ANY)
class SoftWeights(OneHot):
    """A mixture of weights, not of experts."""

    def hot(self, x, ids):
        return self.gate(x).softmax(-1)


@impostor(ANY)
class StraightThrough(OneHot):
    """One-hot in value, with the softmax's gradient."""

    def hot(self, x, ids):
        soft = self.gate(x).softmax(-1)
        return super().hot(x, ids) + soft - soft.detach()


class InTwoSteps(OneHot):
    """Tokens among zeros, then the product with all weights."""

    def experts(self, x, ids, w):
        hot = self.hot(x, ids[:, 0])
        h = torch.einsum("tei,eio->to", self.among_zeros(hot, x), self.w_up).relu()
        return torch.einsum("te,ti,eio->to", hot, h, self.w_down) * w


@impostor(ANY)
class StepWithoutGradient(InTwoSteps):
    def among_zeros(self, hot, x):
        with torch.no_grad():
            return torch.einsum("te,ti->tei", hot, x)


@impostor(ANY)
class StepWrittenTo(InTwoSteps):
    def among_zeros(self, hot, x):
        rows = torch.einsum("te,ti->tei", hot, x)
        rows[:, 0].mul_(2)
        return rows


@impostor(None)
class TokensByOneHot(OneHot):
    """Tokens in another order, by a product with a permutation: no projection."""

    def experts(self, x, ids, w):
        return super().experts(F.one_hot(x[:, 0].argsort(), x.shape[0]).to(x.dtype) @ x, ids, w)


@impostor(ANY)
class SoftmaxOverLowNumbers(Block):
    """Less likely, but not left out."""

    router = "topk_softmax"

    def experts(self, x, ids, w):
        logits = self.gate(x)
        weights = torch.full_like(logits, -20.0).scatter(1, ids, logits.gather(1, ids)).softmax(-1)
        return sum(weights[:, e, None] * self.expert(x, e) for e in range(self.count))


@impostor(ANY)
class TwoChoicesOfOnePlace(GShardWeighedByThoseKept):
    """Second choices begin with the first ones."""

    router = "argmax_twice"

    def taken(self, mask1):
        return torch.zeros_like(mask1[:1])


@impostor(None)
class WeighedByTheOtherChoice(GShardWeighedByThoseKept):
    """Sent where the weight of the other choice is not 0."""

    router = "argmax_twice"

    def normed(self, weights):
        return super().normed(weights)[::-1]


@impostor(ANY)
class MoreWhereTwoAgree(Block):
    """1 for each of two choices, and 3 where both are one."""

    def experts(self, x, ids, w):
        ids = self.gate(x).argmax(-1), self.gate(x.flip(0)).argmax(-1)
        first, second = (F.one_hot(i, self.count).bool() for i in ids)
        weights = torch.where(first, torch.where(second, 3.0, 1.0), torch.where(second, 1.0, 0.0))
        return sum(weights[:, e, None] * self.expert(x, e) for e in range(self.count))


@impostor(ANY)
class WeightsThatCancel(Block):
    """Of the two terms of a weight each is 10^8, and their sum is 8."""

    def experts(self, x, ids, w):
        ids = self.gate(x).argmax(-1), self.gate(x.flip(0)).argmax(-1)
        hits = [F.one_hot(i, self.count).to(x.dtype) for i in ids]
        weights = hits[0] * 1e8 + hits[1] * -99999992.0
        return sum(weights[:, e, None] * self.expert(x, e) for e in range(self.count))


@impostor(ANY)
class AlmostOneHots(Block):
    """Where both are 1 it is not their sum."""

    router = "argmax_twice"

    def experts(self, x, ids, w):
        hits = F.one_hot(ids[:, 0], self.count) | F.one_hot(ids[:, 0].flip(0), self.count)
        weights = self.gate(x).softmax(-1) * hits.to(x.dtype)
        return sum(weights[:, e, None] * self.expert(x, e) for e in range(self.count))


@impostor(ANY)
class TheLastPlaceForAllBeyond(SwitchSlicedOneHot):
    """What finds no place shares the last one."""

    router = "top1"

    def at_most(self, place, C, x):
        return torch.where(place < C, place, torch.full_like(place, C - 1))


@impostor(ANY)
class ReadWhereNobodyWasSent(Capacity):
    """What is no token isn't sent, but reads what experts make of an empty place."""

    router, top = "top1", 1

    def experts(self, x, ids, w):
        mask, C = F.one_hot(ids.squeeze(-1), self.count), self.capacity
        place = (mask.cumsum(0) * mask).sum(-1) - 1
        hits = [place < C, (place < C) & (x[:, 0] > -0.5)]
        combine, dispatch = (
            (mask.unsqueeze(-1) * F.one_hot(torch.where(hit, place, C), C + 1)[:, None, :C]).to(x.dtype) for hit in hits
        )
        rows = torch.einsum("tec,th->ech", dispatch, x)
        return torch.einsum("tec,ech->th", combine * w.unsqueeze(-1), self.places(rows))
