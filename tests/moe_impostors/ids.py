"""Ids of one token that may be alike: of two routers, of a topk along the tokens, in dtypes that do not hold them."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.moe_impostors.base import ANY, Sorted, impostor
from tests.moe_spellings.base import Block, T


@impostor(None)
class IdsThatMayBeAlike(Block):
    """Two routers may choose one expert twice: it counts once."""

    def experts(self, x, ids, w):
        probabilities, out = self.gate(x).softmax(-1), torch.zeros_like(x)
        ids = self.choices(x)
        for e in range(self.count):
            mask = (ids == e).any(-1)
            out[mask] += probabilities[mask, e].unsqueeze(-1) * self.expert(x[mask], e)
        return out

    def choices(self, x):
        return torch.stack([self.gate(x).argmax(-1), self.gate(x.flip(0)).argmax(-1)], dim=1)


@impostor(ANY)
class ChosenAlongTheTokens(IdsThatMayBeAlike):
    """A topk over the other dim: ids of one token may be alike."""

    count = 24

    def choices(self, x):
        return self.gate(x).T[:, :2].topk(x.shape[0], dim=0).indices


class WrappedIds(Block):
    """Of 299 experts, numbered by a dtype that does not hold their numbers: ids of a token may be alike."""

    count, kind, held = 299, "relu", torch.uint8

    def route(self, x):
        w, ids = super().route(x)
        return w, ids.to(self.held).long()

    def experts(self, x, ids, w):
        h = torch.einsum("ti,tkio->tko", x, self.w_up[ids]).relu()
        return (torch.einsum("tki,tkio->tko", h, self.w_down[ids]) * w.unsqueeze(-1)).sum(1)


@impostor(None)
class WrappedIdsGathered(WrappedIds):
    pass


@impostor(None)
class RoundedIdsGathered(WrappedIds):
    held = torch.bfloat16


@impostor(None)
class WrappedIdsInAMatrix(WrappedIds):
    """The last of two that are alike counts."""

    def experts(self, x, ids, w):
        matrix, out = x.new_zeros(x.shape[0], self.count).scatter(1, ids, w), torch.zeros_like(x)
        for e in range(0, self.count, 50):
            out = out + matrix[:, e, None] * self.expert(x, e)
        return out


@impostor(None)
class RoundedIdsInAOneHot(WrappedIds):
    held = torch.bfloat16

    def experts(self, x, ids, w):
        hot = F.one_hot(ids, self.count).to(x.dtype)
        h = torch.einsum("tke,ti,eio->tko", hot, x, self.w_up).relu()
        return (torch.einsum("tke,tki,eio->tko", hot, h, self.w_down) * w.unsqueeze(-1)).sum(1)


class OneHotOf(Block):
    """Ids that are no places of a router's scores, as one-hots."""

    top, kind = 1, "relu"

    def experts(self, x, ids, w):
        hot = F.one_hot(self.numbers(self.gate(x)), self.count).to(x.dtype)
        h = torch.einsum("te,ti,eio->to", hot, x, self.w_up).relu()
        return torch.einsum("te,ti,eio->to", hot, h, self.w_down)


@impostor(None)
class GreaterOfTwo(OneHotOf):
    def numbers(self, logits):
        return torch.max(logits.argmax(-1), logits.flip(0).argmax(-1))


@impostor(None)
class PlaceAmongAll(OneHotOf):
    """argmax without a dim counts through all scores."""

    def numbers(self, logits):
        return (logits.argmax() % self.count).expand(logits.shape[0])


@impostor(None)
class NegativeHits(Block):
    """A sum that is never greater than 0, of hits that count -1."""

    def experts(self, x, ids, w):
        probabilities, out = self.gate(x).softmax(-1), torch.zeros_like(x)
        for e in range(self.count):
            (token,) = torch.where(torch.where(ids == e, -1, 0).sum(-1) > 0)
            out = out.index_add(0, token, self.expert(x[token], e) * probabilities[token, e, None])
        return out


class IdsFromTheEnd(Block):
    """Ids that were found elsewhere and may count from the end, as indices do: -1 is the last expert."""

    kind, count = "gelu", 5

    def __init__(self):
        super().__init__()
        ids = torch.stack([torch.randperm(self.count)[: self.top] for _ in range(16 * T)])
        self.found = nn.Buffer(ids - self.count * (torch.rand(ids.shape) < 0.5))

    def route(self, x):
        w, _ = super().route(x)
        return w, self.found[: x.shape[0]]

    def every(self, x, dim):
        return torch.stack([self.expert(x, e) for e in range(self.count)], dim)


@impostor(None)
class WeightsFromTheEnd(IdsFromTheEnd):
    def experts(self, x, ids, w):
        h = F.gelu(torch.einsum("ti,tkio->tko", x, self.w_up[ids]))
        return (torch.einsum("tki,tkio->tko", h, self.w_down[ids]) * w.unsqueeze(-1)).sum(1)


@impostor(None)
class ResultsFromTheEnd(IdsFromTheEnd):
    def experts(self, x, ids, w):
        return (self.every(x, 0)[ids, torch.arange(x.shape[0])[:, None]] * w[..., None]).sum(1)


@impostor(None)
class ResultsOfTokensFromTheEnd(IdsFromTheEnd):
    def experts(self, x, ids, w):
        return torch.einsum("tkd,tk->td", self.every(x, 1)[torch.arange(x.shape[0]).unsqueeze(1), ids], w)


@impostor(None)
class FlatResultsFromTheEnd(IdsFromTheEnd):
    def experts(self, x, ids, w):
        flat = self.every(x, 0).flatten(0, 1)
        return (flat[ids * x.shape[0] + torch.arange(x.shape[0])[:, None]] * w.unsqueeze(-1)).sum(1)


@impostor(None)
class OneHotFromTheEnd(IdsFromTheEnd):
    def experts(self, x, ids, w):
        hot = (torch.eye(self.count, dtype=x.dtype)[ids] * w.unsqueeze(-1)).sum(1)
        return sum(hot[:, e, None] * self.expert(x, e) for e in range(self.count))


@impostor(None)
class ResultsAlongADimFromTheEnd(IdsFromTheEnd):
    def experts(self, x, ids, w):
        return (torch.take_along_dim(self.every(x, 1), ids[..., None], 1) * w[..., None]).sum(1)


class ColumnByColumn(Block):
    """The matrix of weights is scattered one choice after the other, in parts."""

    top = 3

    def experts(self, x, ids, w):
        matrix = torch.zeros(x.shape[0], self.count, dtype=w.dtype)
        for k in range(self.top):
            matrix = matrix.scatter(1, self.column(ids, k), self.weight(w, k))
        return sum(matrix[:, e, None] * self.expert(x, e) for e in range(self.count))

    def column(self, ids, k):
        return ids[:, k : k + 1]

    def weight(self, w, k):
        return w[:, k : k + 1]


@impostor(None)
class ColumnsOfTheOtherWeights(ColumnByColumn):
    def weight(self, w, k):
        return w[:, 2 - k, None]


@impostor(None)
class ColumnsOfOtherTokens(ColumnByColumn):
    def column(self, ids, k):
        return ids.flip(0)[:, k : k + 1]


@impostor(None)
class NotAllColumns(ColumnByColumn):
    top = 2

    def route(self, x):
        return self.gate(x).softmax(-1).topk(3, dim=-1)


@impostor(None)
class OneColumnTwice(ColumnByColumn):
    def column(self, ids, k):
        return ids[:, min(k, 1), None]

    def weight(self, w, k):
        return w[:, min(k, 1), None]


@impostor(None)
class NoNumberWhereNothingIsSet(Block):
    """What is no number is true."""

    def experts(self, x, ids, w):
        mask = torch.full((x.shape[0], self.count), float("nan")).scatter(1, ids, 0.0).bool()
        out, p = torch.zeros_like(x), self.gate(x).softmax(-1)
        for e in range(self.count):
            token = torch.where(mask[:, e])[0]
            out.index_add_(0, token, self.expert(x[token], e) * p[token, e, None])
        return out


class Hashed(Sorted):
    """Ids of a table, which has no number that is no expert's, though nothing says so."""

    def __init__(self):
        super().__init__()
        self.table = nn.Buffer(torch.arange(50).view(25, 2) % (self.count - 1))

    def route(self, x):
        ids = self.table[torch.arange(len(x)) % 25]
        return self.weighed(self.gate(x).softmax(-1), ids), self.used(ids)

    def weighed(self, p, ids):
        raise NotImplementedError

    def used(self, ids):
        return ids


UNPROVEN = "the ids of a grouped product are not proven to be numbers of experts"


@impostor(UNPROVEN)
class ScoresGatheredAlongTheTokens(Hashed):
    """They are below the number of tokens."""

    def weighed(self, p, ids):
        return p[:, : self.top].gather(0, ids)


@impostor(UNPROVEN)
class ScoresGatheredAmongMore(Hashed):
    def weighed(self, p, ids):
        return torch.cat([p, p], -1).gather(1, ids)


@impostor(UNPROVEN)
class ScoresIndexedFromTheEnd(Hashed):
    """An index may be negative."""

    def weighed(self, p, ids):
        return p[torch.arange(len(p))[:, None], ids]


@impostor(UNPROVEN)
class IdsMovedAfterTheirUse(Hashed):
    def weighed(self, p, ids):
        return p.gather(1, ids)

    def used(self, ids):
        return ids + 1


@impostor(UNPROVEN)
class OthersOfTheTableUsed(Hashed):
    """Half of the table is read at numbers of experts, the other half is what is used."""

    def weighed(self, p, ids):
        return p.gather(1, ids)

    def used(self, ids):
        return self.table[torch.arange(len(ids)) % 25 - 7]


@impostor(UNPROVEN)
class TableWrittenAfterItsUse(Hashed):
    def weighed(self, p, ids):
        return p.gather(1, ids)

    def used(self, ids):
        self.table.view(-1).mul_(0)
        return self.table[torch.arange(len(ids)) % 25]
