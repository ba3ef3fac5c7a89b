"""Places of experts that hold another token, none, or more than one."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.base import H, T
from tests.moe_spellings.capacity import (
    Capacity,
    GShard,
    GShardByPositiveWeights,
    OneHotsSummed,
    PlacesCompared,
    SwitchInFloats,
    TopKGating,
)


class Switch(Capacity):
    """Dispatch and combine tensors [T,E,C], in parts."""

    top, router, kind = 1, "top1", "relu"

    def experts(self, x, ids, w):
        mask = F.one_hot(ids.squeeze(-1), self.count)
        place = (torch.cumsum(self.counted(mask), dim=0) * mask).sum(dim=-1) - 1
        mask = mask * (place < self.capacity).unsqueeze(-1)
        where = F.one_hot(place.clamp(min=0, max=self.capacity - 1), self.capacity)
        combine = (mask.unsqueeze(-1) * where.unsqueeze(1)).to(x.dtype)
        rows = self.rows(self.sent(combine, x, w), x)
        return torch.einsum("tec,ech->th", self.returned(combine) * w.unsqueeze(-1), self.places(rows))

    def counted(self, mask):
        return mask

    def sent(self, combine, x, w):
        return combine

    def returned(self, combine):
        return combine

    def rows(self, sent, x):
        return torch.einsum("tec,th->ech", sent, x)


@impostor(ANY)
class PlacesByOtherTokens(Switch):
    """The running sum counts each token under its neighbour's expert: two may have one place."""

    def counted(self, mask):
        return mask.roll(1, 0)


@impostor(ANY)
class PlacesByHalfTheTokens(Switch):
    def counted(self, mask):
        return mask * (torch.arange(mask.shape[0]) % 2)[:, None]


@impostor(ANY)
class LightTokensAreNotSent(Switch):
    """They read a place that holds zeros."""

    def sent(self, combine, x, w):
        return combine * (w > 0.4).unsqueeze(-1)


@impostor(ANY)
class TokensAreScaledAsTheyAreSent(Switch):
    kind = "gelu"

    def sent(self, combine, x, w):
        return combine * x[:, :1].unsqueeze(-1)


@impostor(ANY)
class ReadsTheNextPlace(Switch):
    def returned(self, combine):
        return combine.roll(1, 2)


@impostor(ANY)
class SentWhereAnotherFactorIsNotZero(Switch):
    def sent(self, combine, x, w):
        return ((combine * torch.relu(x[:, :1, None])) != 0).to(x.dtype)


class Compared(Switch):
    """Places are compared with numbers: there is no place -1, and none beyond the last."""

    def experts(self, x, ids, w):
        mask = F.one_hot(ids.squeeze(-1), self.count)
        place = (self.running(mask) * mask).sum(dim=-1) - 1
        where = place[:, None] == torch.arange(self.capacity)
        dispatch = (mask.unsqueeze(-1) * where.unsqueeze(1)).to(x.dtype)
        rows = torch.einsum("tec,th->ech", dispatch, x)
        return torch.einsum("tec,ech->th", dispatch * w.unsqueeze(-1), self.places(rows))


@impostor(ANY)
class EveryOtherTokenIsCounted(Compared):
    """The others have the place of the one before."""

    def running(self, mask):
        return (mask * (torch.arange(mask.shape[0]) % 2)[:, None]).cumsum(0)


@impostor(ANY)
class CountedInTwoHalves(Compared):
    """Even and odd tokens are counted apart: two have one place."""

    def running(self, mask):
        t = torch.arange(mask.shape[0])
        halves = mask * (t % 2 == torch.arange(2)[:, None]).unsqueeze(-1)
        return halves.cumsum(1)[t % 2, t]


@impostor(None)
class CountedAsTheyAre(Compared):
    """No near miss: what the others change."""

    def running(self, mask):
        return mask.cumsum(0)


@impostor(ANY, shape=(1, 300, H))
class PlacesInHalfPrecision(SwitchInFloats):
    """All tokens go to one expert, more than bfloat16 can count: some share places."""

    capacity = 290

    def running(self, mask):
        return torch.cumsum(mask.bfloat16(), dim=0).float()

    def route(self, x):
        logits = self.gate(x) + 100 * (torch.arange(self.count) == 1)
        return torch.topk(logits.softmax(-1), 1, dim=-1)


@impostor(ANY)
class PlacesOfOtherTokensInFloats(SwitchInFloats):
    """The running sum is one of another mask."""

    router = "top1"

    def running(self, mask):
        return torch.cumsum(mask.roll(1, 0), dim=0).clamp(min=1)


class SentByWeight(GShardByPositiveWeights):
    """Every other token weighs 0: it is not sent, and its weight learns from what the place of another gives."""

    kind, bias, capacity = "gelu", True, 4

    def route(self, x):
        w, ids = torch.topk(self.gate(x), self.top, dim=-1)
        return w.abs() * (torch.arange(x.shape[0]) % 2)[:, None], ids


@impostor(ANY)
class SentWhereThePositiveWeightIs(SentByWeight):
    pass


@impostor(ANY)
class SentWhereTheWeightIsNotZero(SentByWeight):
    def sent(self, combine):
        return combine.bool()


@impostor(None)
class SentByASumThatMayBeEmpty(SentByWeight):
    """The weight is a sum over the experts under a condition of its own."""

    def route(self, x):
        probabilities = self.gate(x).softmax(-1)
        ids = probabilities.topk(self.top, -1).indices
        some = (torch.arange(x.shape[0]) % 2 == 1)[:, None]
        hits = (F.one_hot(ids[:, k], self.count) * some for k in range(self.top))
        w = torch.stack([(probabilities * hit).sum(-1) for hit in hits], dim=1)
        return w / w.sum(-1, keepdim=True).clamp(min=1e-9), ids


@impostor("rounded to torch.bfloat16")
class RowsAreRoundedByAutocast(Switch):
    """Only the product that sends them is made in bfloat16."""

    def rows(self, sent, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.float32):
            return super().rows(sent, x).to(x.dtype)


@impostor(ANY)
class CountedFromTheSecondToken(GShard):
    """Second choices may begin at the last place of the first ones."""

    def taken(self, mask1):
        return torch.sum(mask1[1:], dim=0, keepdim=True)


@impostor(ANY)
class PlacesCountedInPart(TopKGating):
    """Tokens that are not counted are sent too, and share a place with one before them."""

    def counted(self, mask):
        return mask & (torch.arange(mask.shape[0]) % 3 > 0)[:, None]


@impostor(ANY)
class PlacesCountedDown(TopKGating):
    """Each token that is not sent takes a place back."""

    policy = "position"

    def counted(self, mask):
        return 2 * mask.long() - 1


@impostor(ANY)
class EveryTokenIsSent(TopKGating):
    """Those that an expert does not get are sent to its first place, and read nowhere."""

    def sent(self, combine, where):
        return where


@impostor(ANY)
class PlacesOfAnyIds(TopKGating):
    """Ids that may be alike: a token then has one place where it was set twice."""

    def route(self, x):
        w, ids = super().route(x)
        return w, ids // 2 * 2


class ExpertsOfTheirOwn(TopKGating):
    own, kind = True, "gelu"


@impostor(None)
class NeighboursRows(ExpertsOfTheirOwn):
    """Every expert is given the rows of the next one."""

    def rows_of_each(self, rows):
        return rows.roll(-1, 0).unbind(0)


@impostor(ANY)
class OthersPlacesAtOneExpert(ExpertsOfTheirOwn):
    """The rows of one expert lie in another order than they are read back."""

    def rows_of_each(self, rows):
        return [each.flip(0) if e == 1 else each for e, each in enumerate(rows.unbind(0))]


@impostor(ANY)
class OnePartOfThePlacesCounted(ExpertsOfTheirOwn):
    def counted(self, mask):
        return mask & (torch.arange(mask.shape[0]) % 3 > 0)[:, None]


@impostor(ANY)
class PlacesComparedCountedInPart(PlacesCompared):
    """Who is not counted has the place of one before."""

    def counted(self, mask):
        return mask * (torch.arange(mask.shape[0]) % 3 > 0)[:, None]


@impostor(ANY)
class PlacesComparedCountedDown(PlacesCompared):
    """Each token that is not sent takes a place back."""

    def counted(self, mask):
        return 2 * mask - 1


@impostor(ANY)
class OneHotsOfIdsThatMayBeAlike(OneHotsSummed):
    def __init__(self):
        super().__init__()
        self.found = nn.Buffer(torch.randint(0, self.count, (16 * T, self.top)))

    def route(self, x):
        w, _ = super().route(x)
        return w, self.found[: x.shape[0]]
