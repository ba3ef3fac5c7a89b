"""Buffers of places filled choice after choice, or sequence by sequence, whose counts are of something else."""

import torch
import torch.nn.functional as F

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.base import B, S
from tests.moe_spellings.buffers import ChoiceAfterChoice, OneMaskOfAllChoices, SwitchPerSequence
from tests.moe_spellings.capacity import GShard, GShardAfterThoseKept
from tests.moe_spellings.dense import OneOfAll, WhereFromTheFirst


class Choices(ChoiceAfterChoice):
    """Choices one after the other, in parts."""

    top, kind = 3, "relu"

    def experts(self, x, ids, w):
        E, C = self.count, self.capacity
        hits = [F.one_hot(ids[:, k], E) for k in range(self.top)]
        places = [((torch.cumsum(h, 0) - 1 + self.taken(hits[:k], ids)) * h).sum(1) for k, h in enumerate(hits)]
        kept = [(p < C).unsqueeze(-1) for p in places]
        slots = [ids[:, k] * C + p.clamp(max=C - 1) for k, p in enumerate(places)]
        sent = x.new_zeros(E * C, x.shape[-1])
        for k in range(self.top):
            sent = sent.index_add(0, slots[k], x * kept[self.asks(k)])
        y = self.places(sent.view(E, C, -1)).view(E * C, -1)
        return sum(y[slots[k]] * (w[:, k, None] * kept[k]) for k in range(self.top))

    def taken(self, hits, ids):
        return sum(h.sum(0, keepdim=True) for h in hits)

    def asks(self, k):
        return k


@impostor(ANY)
class ThirdChoicesAfterTheFirst(Choices):
    def taken(self, hits, ids):
        return super().taken(hits[:1], ids)


@impostor(ANY)
class EachAfterTheFirstTwice(Choices):
    """As many as there must be, but the same ones."""

    def taken(self, hits, ids):
        return super().taken(hits[:1] * len(hits), ids)


@impostor(ANY)
class TakenByTheNextExpert(Choices):
    def taken(self, hits, ids):
        return super().taken([h.roll(1, 1) for h in hits], ids)


@impostor(ANY)
class TakenByHalfTheTokens(Choices):
    def taken(self, hits, ids):
        return super().taken([h[: h.shape[0] // 2] for h in hits], ids)


@impostor(ANY)
class KeptAsAnotherChoice(Choices):
    def asks(self, k):
        return 0


@impostor(ANY)
class MatrixOfOtherIds(OneMaskOfAllChoices):
    """The routing matrix is set at other experts than the mask's."""

    def experts(self, x, ids, w):
        T, E, C = x.shape[0], self.count, self.capacity
        dense = torch.zeros(T, E, dtype=w.dtype).scatter(-1, x[:, :E].topk(self.top).indices, w)
        mask = F.one_hot(ids, num_classes=E).permute(1, 0, 2)
        rank = (mask.reshape(self.top * T, E).cumsum(0) - 1).reshape(self.top, T, E)
        mask = mask * torch.lt(rank, C)
        rank = torch.sum(mask * rank, dim=-1)
        combine = torch.sum((mask * dense[None]).unsqueeze(3) * F.one_hot(rank, num_classes=C).unsqueeze(2), dim=0)
        y = self.places(combine.bool().permute(1, 2, 0).type_as(x) @ x)
        return combine.view(T, -1).type_as(x) @ y.view(E * C, -1)


@impostor(ANY)
class SequencesShareTheirPlaces(SwitchPerSequence):
    """Places are counted in a sequence, and hold the tokens of all of them."""

    router, kind, three = "top1", "relu", True

    def experts(self, x, ids, w):
        mask = F.one_hot(ids.squeeze(-1), self.count)
        place = (torch.cumsum(mask, dim=1) * mask).sum(dim=-1) - 1
        mask = mask * (place < self.capacity).unsqueeze(-1)
        where = F.one_hot(place.clamp(max=self.capacity - 1), self.capacity)
        dispatch = torch.einsum("bse,bsc->bsec", mask, where).to(x.dtype).view(B * S, self.count, -1)
        rows = torch.einsum("tec,th->ech", dispatch, x.reshape(B * S, -1))
        y = torch.einsum("tec,ech->th", dispatch * w.view(B * S, 1, 1), self.places(rows))
        return y.view(x.shape)


@impostor(ANY)
class NegativeWeightsAreNotSent(GShard):
    """Weights may be negative: then a token weighs an expert's answer to nothing, its bias."""

    bias, capacity = True, 4

    def route(self, x):
        return torch.topk(self.gate(x), self.top, dim=-1)

    def sent(self, combine):
        return combine > 0


@impostor(ANY)
class TheFirstForTwo(OneOfAll):
    """Tokens of the second expert get the first one's result."""

    def choose(self, ids, ys):
        out = ys[0]
        for e in range(2, self.count):
            out = torch.where((ids == e)[:, None], ys[e], out)
        return out


@impostor(None)
class OthersReplaced(OneOfAll):
    """The last comparison takes the results of others away."""

    def choose(self, ids, ys):
        out = torch.zeros_like(ys[0])
        for e, y in enumerate(ys):
            out = torch.where((ids == e)[:, None] | (ids == 0)[:, None], y, out)
        return out


@impostor(ANY)
class LeftOverOfMore(WhereFromTheFirst):
    """The router chooses among more than there are experts: what none of the others is may be none."""

    def route(self, x):
        return torch.ones(x.shape[0], 1, dtype=x.dtype), x[:, : self.count + 1].argmax(-1, keepdim=True)


@impostor(ANY)
class StackIndexedByOthers(OneOfAll):
    def choose(self, ids, ys):
        return torch.stack(ys)[ids, torch.arange(len(ids)).flip(0)]


@impostor(ANY)
class SecondChoicesOnTheLastFirstOne(GShardAfterThoseKept):
    """One place less is counted than first choices are sent to."""

    router, fewer = "argmax_twice", 1


@impostor(ANY)
class SecondChoicesAfterThoseOfEvenTokens(GShard):
    router = "argmax_twice"

    def taken(self, mask1):
        even = (torch.arange(mask1.shape[0]) % 2 == 0)[:, None]
        return torch.sum(mask1 * even, dim=0, keepdim=True)
