"""The wrong token, row, permutation, offset or place."""

import torch
import torch.nn.functional as F

from tests.moe_impostors.base import ANY, Loop, Sorted, impostor
from tests.moe_spellings.base import Block, H, T
from tests.moe_spellings.capacity import Capacity, GShard


@impostor(None)
class ReadAnotherToken(Loop):
    def read(self, token):
        return (token + 1) % T


@impostor(None)
class WrittenToAnotherToken(Loop):
    def written(self, token):
        return (token + 1) % T


@impostor(None)
class WrittenByChoice(Loop):
    """index_add_ with the wrong half of what torch.where gave."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out.index_add_(0, k, self.expert(x[token], e) * w[token, k, None])
        return out


@impostor(None)
class TransposedMask(Block):
    """one_hot without the permute: torch.where's parts are token and choice, used the other way round."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.count).permute(2, 0, 1)
        for e in range(self.count):
            k, token = torch.where(mask[e])
            out.index_add_(0, k, self.expert(x[token], e) * w[k, token, None])
        return out


@impostor(None)
class BackInDescendingOrder(Sorted):
    """What sorts a permutation downwards is not its inverse."""

    def back(self, y, perm):
        return y[perm.argsort(descending=True)]


@impostor(ANY)
class OffsetsOffByOne(Sorted):
    """The first expert gets one row less, and so on."""

    def offsets(self, ids_g):
        return (super().offsets(ids_g) - 1).clamp(min=0)

    def back(self, y, perm):
        return torch.where(torch.arange(y.shape[0])[:, None] < y.shape[0] - 1, y, 0.0)[perm.argsort()]


@impostor("counted in torch.int16")
class CountedInSixteenBits(Sorted):
    """More than 32767 pairs wrap around."""

    def offsets(self, ids_g):
        counts = F.one_hot(ids_g, self.count).sum(0).to(torch.int16)
        return counts.cumsum(0, dtype=torch.int16).to(torch.int32)


@impostor(ANY)
class HistcWithOneBinTooMany(Sorted):
    """max = E: all ids still fall into their own bins only if bins are E + 1."""

    def offsets(self, ids_g):
        counts = torch.histc(ids_g.float() + 0.5, bins=self.count, min=0, max=self.count + 1)
        return counts.cumsum(0, dtype=torch.int32)


@impostor(ANY)
class HistcFromMinusOne(Sorted):
    """Every id is counted, one bin later; the last two share theirs."""

    def offsets(self, ids_g):
        counts = torch.histc(ids_g.float(), bins=self.count, min=-1, max=self.count - 1)
        return counts.cumsum(0, dtype=torch.int32)


@impostor(ANY)
class JoinedWithChoicesAmongMore(Sorted):
    """The second choice is one of more places than there are experts, so far as the graph says."""

    def experts(self, x, ids, w):
        more = x[:, : self.count + 2].masked_fill(torch.arange(self.count + 2) >= self.count, float("-inf"))
        choices = x[:, : self.count].argmax(-1, keepdim=True), more.argmax(-1, keepdim=True)
        return super().experts(x, torch.cat(choices, -1), w)


@impostor(ANY)
class OffsetsOfOtherIds(Sorted):
    """Rows are sorted by the router's ids, the offsets count those of another ranking."""

    def experts(self, x, ids, w):
        self.others = x[:, : self.count].topk(self.top).indices
        return super().experts(x, ids, w)

    def offsets(self, ids_g):
        return super().offsets(self.others.reshape(-1))


@impostor(None)
class PermutationNotInverted(Sorted):
    def back(self, y, perm):
        return y[perm]


@impostor(None)
class WeightsNotPermuted(Sorted):
    def weights(self, w, perm):
        return w


@impostor(None)
class TokenIsRemainder(Sorted):
    """perm % T instead of perm // K: the choices' order is not the pairs'."""

    def token(self, perm):
        return perm % T


@impostor(None)
class SortedDescending(Sorted):
    def experts(self, x, ids, w):
        flat = ids.reshape(-1)
        ids_g, perm = torch.sort(flat, descending=True)
        y = self.rows(x[perm // self.top], ids_g, self.offsets(ids_g)) * w.reshape(-1)[perm][:, None]
        return y[perm.argsort()].view(-1, self.top, x.shape[-1]).sum(1)


@impostor(None)
class SortedByAnotherKey(Sorted):
    def experts(self, x, ids, w):
        flat = ids.reshape(-1)
        ids_g, perm = torch.sort(flat)
        rows = x[perm // self.top]
        y = self.rows(rows, ids_g, self.offsets(ids_g)) * w.reshape(-1)[perm][:, None]
        return y[flat.roll(1).argsort().argsort()].view(-1, self.top, x.shape[-1]).sum(1)


@impostor(None)
class WeightsByPermutedIds(Block):
    """W[ids] with up and down by different ids."""

    def experts(self, x, ids, w):
        pre = torch.einsum("th,tkhf->tkf", x, self.w_up[ids])
        y = torch.einsum("tkf,tkfh->tkh", self.activate(pre), self.w_down[ids.flip(-1)])
        return (y * w.unsqueeze(-1)).sum(1)


@impostor(None)
class IdsPermutedThroughout(Block):
    """The same permutation for all weights: a mixture with other ids."""

    def experts(self, x, ids, w):
        ids = torch.tensor([2, 0, 3, 1])[ids]
        pre = torch.einsum("th,tkhf->tkf", x, self.w_up[ids])
        y = torch.einsum("tkf,tkfh->tkh", self.activate(pre), self.w_down[ids])
        return (y * w.unsqueeze(-1)).sum(1)


@impostor(None)
class MeanOverChoices(Block):
    def experts(self, x, ids, w):
        pre = torch.einsum("th,tkhf->tkf", x, self.w_up[ids])
        y = torch.einsum("tkf,tkfh->tkh", self.activate(pre), self.w_down[ids])
        return (y * w.unsqueeze(-1)).mean(1)


@impostor(None)
class SummedOverTokens(Block):
    """The sum goes over the wrong dim of what has T = K sizes alike elsewhere; expanded back."""

    def experts(self, x, ids, w):
        pre = torch.einsum("th,tkhf->tkf", x, self.w_up[ids])
        y = torch.einsum("tkf,tkfh->tkh", self.activate(pre), self.w_down[ids])
        return (y * w.unsqueeze(-1)).sum(0)[:1].expand_as(x)


@impostor(None)
class PlacesOfAnotherMask(Capacity):
    """Capacity places counted over the other choice's mask: tokens meet in one place and are added up."""

    def experts(self, x, ids, w):
        masks = F.one_hot(ids, self.count)
        place = ((masks[:, 1].cumsum(0) - 1) * masks[:, 1]).sum(-1)
        kept = (place < self.capacity).to(x.dtype)[:, None, None]
        where = F.one_hot(place.clamp(max=self.capacity - 1), self.capacity).to(x.dtype)
        dispatch = masks[:, 0].to(x.dtype).unsqueeze(-1) * where.unsqueeze(1) * kept
        rows = torch.einsum("tec,th->ech", dispatch, x)
        return torch.einsum("tec,ech->th", dispatch * w[:, :1, None], self.places(rows))


@impostor(ANY)
class CapacityWithoutDrop(Capacity):
    """Places beyond the capacity are clamped into the last one: tokens share it."""

    def experts(self, x, ids, w):
        mask = F.one_hot(ids[:, 0], self.count)
        place = (torch.cumsum(mask, dim=0) * mask).sum(dim=-1) - 1
        where = F.one_hot(place.clamp(max=self.capacity - 1), self.capacity)
        dispatch = (mask.unsqueeze(-1) * where.unsqueeze(1)).to(x.dtype)
        rows = torch.einsum("tec,th->ech", dispatch, x)
        return torch.einsum("tec,ech->th", dispatch * w[:, :1, None], self.places(rows))


@impostor(None)
class BiasInEmptyPlaces(Capacity):
    """Experts with biases answer in empty places too, which the combine must not count."""

    bias = True

    def experts(self, x, ids, w):
        mask = F.one_hot(ids[:, 0], self.count)
        place = (torch.cumsum(mask, dim=0) * mask).sum(dim=-1) - 1
        mask = mask * (place < self.capacity).unsqueeze(-1)
        where = F.one_hot(place.clamp(max=self.capacity - 1), self.capacity)
        dispatch = (mask.unsqueeze(-1) * where.unsqueeze(1)).to(x.dtype)
        y = self.places(torch.einsum("tec,th->ech", dispatch, x))
        return torch.einsum("tec,ech->th", dispatch * w[:, :1, None], y) + y.sum((0, 1))


# Sizes alike: only the order of dims tells them apart


@impostor(None, shape=(1, 4, H))
class RoutingTransposed(Block):
    """T = E: row e of the routing matrix instead of column e."""

    def experts(self, x, ids, w):
        routing = x.new_zeros(x.shape[0], self.count).scatter(1, ids, w)
        return sum(routing[e, :, None] * self.expert(x, e) for e in range(self.count))


@impostor(None, shape=(1, 4, H))
class ScatteredAlongTokens(Block):
    """T = E: the weights are scattered along the other dim."""

    def experts(self, x, ids, w):
        routing = x.new_zeros(x.shape[0], self.count).scatter(0, ids, w)
        return sum(routing[:, e, None] * self.expert(x, e) for e in range(self.count))


@impostor(None, shape=(1, 2, H))
class SummedOverTokensOfEqualNumber(Block):
    """T = K: the sum goes over tokens, one row for every choice."""

    def experts(self, x, ids, w):
        pre = torch.einsum("th,tkhf->tkf", x, self.w_up[ids])
        y = torch.einsum("tkf,tkfh->tkh", self.activate(pre), self.w_down[ids])
        return (y * w.unsqueeze(-1)).sum(0)


@impostor(None, shape=(1, 2, H))
class TokensAndChoicesSwapped(Block):
    """T = K: ids read [K,T]."""

    def experts(self, x, ids, w):
        pre = torch.einsum("th,tkhf->tkf", x, self.w_up[ids.T])
        y = torch.einsum("tkf,tkfh->tkh", self.activate(pre), self.w_down[ids.T])
        return (y * w.unsqueeze(-1)).sum(1)


@impostor(None, shape=(1, 4, H))
class GatheredByToken(Block):
    """T = E: the outputs [E,T,H] are gathered as if they were [T,E,H]."""

    def experts(self, x, ids, w):
        ys = torch.stack([self.expert(x, e) for e in range(self.count)])
        chosen = ys.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return (chosen * w.unsqueeze(-1)).sum(dim=1)


@impostor(None, shape=(1, 2, H))
class RepeatedTheOtherWay(Sorted):
    """T = K: x.repeat instead of x.repeat_interleave."""

    def experts(self, x, ids, w):
        ids_g, perm = torch.sort(ids.reshape(-1))
        y = self.rows(x.repeat(self.top, 1)[perm], ids_g, self.offsets(ids_g)) * w.reshape(-1)[perm][:, None]
        return self.back(y, perm).view(-1, self.top, x.shape[-1]).sum(1)


@impostor(ANY)
class SecondChoicesOnTopOfFirst(GShard):
    """Second choices begin at place 0 again: a place holds two tokens, added up."""

    router = "argmax_twice"

    def taken(self, mask1):
        return torch.zeros_like(mask1[:1])


@impostor(ANY)
class SecondChoicesAfterTheWrongOnes(GShard):
    """What is added to the places of second choices is not how many first ones there are."""

    router = "argmax_twice"

    def taken(self, mask1):
        return torch.sum(mask1.roll(1, 1), dim=0, keepdim=True)


@impostor(None)
class IdsOfTheFirstTokensOnly(Loop):
    """The last tokens have no ids and get nothing."""

    def hits(self, ids, e):
        return torch.where(ids[:-3] == e)


@impostor(ANY)
class WeighedByRank(Loop):
    """The weight is that of a row's rank among the expert's rows, not of its pair."""

    def weight(self, w, token, k):
        return w.flatten()[: token.shape[0]]


@impostor(ANY)
class AddsOneOfTheRowsThatMeet(Sorted):
    """`out[i] += y` adds once where i names a token twice."""

    def experts(self, x, ids, w):
        ids_g, perm = torch.sort(ids.reshape(-1))
        y = self.rows(x[perm // self.top], ids_g, self.offsets(ids_g)) * w.reshape(-1)[perm][:, None]
        out = torch.zeros_like(x)
        out[perm // self.top] += y
        return out


@impostor(None)
class RoutingMultiplied(Block):
    """What a scatter multiplies stays zero."""

    def experts(self, x, ids, w):
        routing = x.new_zeros(x.shape[0], self.count).scatter(1, ids, w.to(x.dtype).detach(), reduce="multiply")
        return sum(routing[:, e, None] * self.expert(x, e) for e in range(self.count))
