"""Near-misses: name -> a block that looks like a mixture of experts -> whether a site of it must be refused.

Each gives the refusal's reason (a pattern over its text; no site), NOTHING where there is no site and need be no
refusal, or None: "refused or right", where fusing is allowed as long as every number agrees with eager. Most are one line away from a spelling of the corpus.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from tests.moe_spellings.base import FF, H, Block, Spelling, T
from tests.moe_spellings.capacity import Capacity
from tests.moe_spellings.dense import Llama4
from tests.moe_spellings.grouped import Grouped
from tests.moe_spellings.loops import WhereIndexAdd

ANY, NOTHING = ".", ""


@dataclasses.dataclass(frozen=True)
class Impostor:
    """A block, in one mode, and the reason pattern of its refusal (None: refused or right)."""

    spelling: Spelling
    reason: str | None

    @property
    def train(self) -> bool:
        return "train" in self.spelling.modes


IMPOSTORS: dict[str, Impostor] = {}


def impostor(reason: str | None, mode: str = "train"):
    def register(block):
        name = block.__name__
        assert name not in IMPOSTORS, name
        IMPOSTORS[name] = Impostor(Spelling(name, block, (3, 7, H), 0, (), torch.float32, (mode,)), reason)
        return block

    return register


class Loop(Block):
    """The where-loop in parts, each of which an impostor changes."""

    order = "oi"

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in self.order_of_experts():
            token, k = self.hits(ids, e)
            y = self.one(x[self.read(token)], e)
            out.index_add_(0, self.written(token), y * self.weight(w, token, k)[:, None])
        return out

    def order_of_experts(self):
        return range(self.count)

    def hits(self, ids, e):
        return torch.where(ids == e)

    def read(self, token):
        return token

    def written(self, token):
        return token

    def weight(self, w, token, k):
        return w[token, k]

    def one(self, rows, e):
        return self.expert(rows, e)


class Masked(Block):
    """The dense masked sum in parts."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in self.order_of_experts():
            out = self.combine(out, self.coefficient(w, ids, e), self.one(x, e))
        return out

    def order_of_experts(self):
        return range(self.count)

    def combine(self, out, c, y):
        return out + c * y

    def coefficient(self, w, ids, e):
        return (w * (ids == e)).sum(-1, keepdim=True)

    def one(self, x, e):
        return self.expert(x, e)


class Sorted(Grouped):
    """The sorted form in parts."""

    def experts(self, x, ids, w):
        flat = ids.reshape(-1)
        ids_g, perm = torch.sort(flat)
        y = self.rows(x[self.token(perm)], ids_g, self.offsets(ids_g)) * self.weights(w.reshape(-1), perm)[:, None]
        return self.back(y, perm).view(-1, self.top, x.shape[-1]).sum(1)

    def token(self, perm):
        return perm // self.top

    def offsets(self, ids_g):
        counts = torch.histc(ids_g.float(), bins=self.count, min=0, max=self.count - 1)
        return counts.cumsum(0, dtype=torch.int32)

    def weights(self, w, perm):
        return w[perm]

    def back(self, y, perm):
        return y[perm.argsort()]


# The experts


@impostor(ANY)
class OneExpertIsWider(Loop):
    own = True

    def __init__(self):
        super().__init__()
        self.list[2].w_up, self.list[2].w_gate = nn.Linear(H, 64, bias=False), nn.Linear(H, 64, bias=False)
        self.list[2].w_down = nn.Linear(64, H, bias=False)


@impostor(None)
class OneExpertHasABias(Loop):
    own, kind = True, "gelu"

    def __init__(self):
        super().__init__()
        self.list[4].w_down = nn.Linear(FF, H, bias=True)


@impostor(ANY)
class OtherActivationPerExpert(Masked):
    kind, own = "relu", True

    def __init__(self):
        super().__init__()
        self.list[3].kind = "gelu"


@impostor(ANY)
class ActivationDependsOnTheExpert(Loop):
    def one(self, rows, e):
        return self.expert(rows, e) if e % 2 else self.expert(rows, e).tanh()


@impostor(ANY)
class ScaledByExpertNumber(Masked):
    """The hidden of expert e is scaled by e + 1 before a nonlinearity."""

    def one(self, x, e):
        return self.linear((self.linear(x, "up", e)[..., :FF] * (e + 1)).tanh(), "down", e)


@impostor(None)
class DropoutInExperts(Loop):
    """With p = 0 it is nothing. What is random cannot be compared; see test_dropout_in_experts_is_refused."""

    probability = 0.0

    def one(self, rows, e):
        return F.dropout(self.expert(rows, e), self.probability, training=True)


@impostor(ANY)
class NormAcrossTokensInside(Loop):
    def one(self, rows, e):
        pre = self.linear(rows, "up", e)
        return self.linear(self.activate(pre - pre.mean(0, keepdim=True)), "down", e)


@impostor(ANY)
class NormAcrossFeaturesInside(Masked):
    """A layer norm of the hidden units is no activation: it mixes them."""

    def one(self, x, e):
        return self.linear(F.layer_norm(self.activate(self.linear(x, "up", e)), (FF,)), "down", e)


@impostor(None)
class ResidualInsideTheExpert(Loop):
    def one(self, rows, e):
        return rows + self.expert(rows, e)


@impostor(None)
class GateAndUpOverlap(Masked):
    """Not halves: columns 0..39 and 20..59."""

    def one(self, x, e):
        pre = self.linear(x, "up", e)
        return self.linear(F.silu(pre[..., :FF]) * pre[..., 20 : 20 + FF], "down", e)


@impostor(None)
class GateColumnsReversed(Masked):
    def one(self, x, e):
        g, u = self.linear(x, "up", e).chunk(2, -1)
        return self.linear(F.silu(g.flip(-1)) * u, "down", e)


@impostor(None)
class UpAndGateSwappedInOneExpert(Masked):
    def one(self, x, e):
        g, u = self.linear(x, "up", e).chunk(2, -1)
        return self.linear(F.silu(u) * g if e == 1 else F.silu(g) * u, "down", e)


@impostor(ANY)
class GradientStoppedInOneExpert(Loop):
    def one(self, rows, e):
        if e != 2:
            return self.expert(rows, e)
        with torch.no_grad():
            return self.expert(rows, e)


@impostor(ANY)
class OutputDetachedInOneExpert(Masked):
    def one(self, x, e):
        return self.expert(x, e).detach() if e == 2 else self.expert(x, e)


# What they read and write


@impostor(ANY, mode="infer")
class WeightWrittenInTheLoop(Loop):
    """The weights of experts 1 and 3 are written after expert 2 has run, and put back at the end."""

    def one(self, rows, e):
        y = self.expert(rows, e)
        if e == 2:
            self.w_down[3].mul_(2.0)
            self.w_down[1].mul_(4.0)
        if e == 5:
            self.w_down[3].mul_(0.5)
            self.w_down[1].mul_(0.25)
        return y


@impostor(ANY, mode="infer")
class StackWrittenInTheSum(Masked):
    """All experts' weights are doubled halfway, and halved at the end."""

    def one(self, x, e):
        if e == 3:
            self.w_up.mul_(2.0)
        y = self.expert(x, e)
        if e == 5:
            self.w_up.mul_(0.5)
        return y


@impostor(None)
class TokensWrittenInTheLoop(Block):
    """x is changed between the experts: later ones read other tokens."""

    def experts(self, x, ids, w):
        out, x = torch.zeros_like(x), x * 1
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token], e) * w[token, k, None])
            x.mul_(0.9)
        return out


@impostor(None)
class OutputReadInTheLoop(Block):
    """Each expert sees what the ones before it have written."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out = out.index_add(0, token, self.expert(x[token] + out[token], e) * w[token, k, None])
        return out


@impostor(None)
class OutputUsedInTheMiddle(Block):
    def experts(self, x, ids, w):
        out, middle = torch.zeros_like(x), 0.0
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out = out.index_add(0, token, self.expert(x[token], e) * w[token, k, None])
            middle = out.square().mean() if e == 2 else middle
        return out + middle


@impostor(None)
class HiddenUsedElsewhere(Masked):
    """The hidden units' size is a penalty in the result."""

    def one(self, x, e):
        hidden = self.activate(self.linear(x, "up", e))
        return self.linear(hidden, "down", e) + hidden.square().mean()


@impostor(None)
class ExpertOutputUsedElsewhere(Masked):
    def experts(self, x, ids, w):
        ys = [self.expert(x, e) for e in range(self.count)]
        return sum(self.coefficient(w, ids, e) * y for e, y in enumerate(ys)) + ys[3].mean()


@impostor(None)
class MaskOfTheNextExpert(Loop):
    """Expert e on the tokens of e + 1: the last expert has none, and who chose 0 gets nothing."""

    def hits(self, ids, e):
        return torch.where(ids == e + 1)


@impostor(None)
class WeightsRotated(Loop):
    """The same, all the way round: a permutation of the experts."""

    def hits(self, ids, e):
        return torch.where(ids == (e + 1) % self.count)


@impostor(None)
class LastExpertSkipped(Loop):
    def order_of_experts(self):
        return range(self.count - 1)


@impostor(None)
class FirstExpertSkipped(Masked):
    def order_of_experts(self):
        return range(1, self.count)


@impostor(None)
class ExpertTwice(Loop):
    def order_of_experts(self):
        return (0, 1, 2, 3, 4, 5, 3)


@impostor(None)
class WeightsOfOneExpertTwice(Masked):
    """Expert 4 computes with the weights of expert 1."""

    def one(self, x, e):
        return self.expert(x, 1 if e == 4 else e)


@impostor(None)
class DownOfAnotherExpert(Masked):
    def one(self, x, e):
        return self.linear(self.activate(self.linear(x, "up", e)), "down", (e + 1) % self.count)


# The router and the combine


@impostor(None)
class WeightOfTheOtherChoice(Loop):
    def weight(self, w, token, k):
        return w[token, 1 - k]


@impostor(None)
class WeightOfAnotherToken(Loop):
    def weight(self, w, token, k):
        return w.roll(1, 0)[token, k]


@impostor(None)
class IdsOfAnotherToken(Loop):
    def hits(self, ids, e):
        return torch.where(ids.roll(1, 0) == e)


@impostor(None)
class WeightsShifted(Masked):
    def coefficient(self, w, ids, e):
        return (w.roll(1, 1) * (ids == e)).sum(-1, keepdim=True)


@impostor(None)
class NotEqual(Masked):
    """Every expert for the tokens that did not choose it."""

    def coefficient(self, w, ids, e):
        return (w * (ids != e)).sum(-1, keepdim=True)


@impostor(ANY)
class CoefficientIsMax(Masked):
    """Another number where no choice is e, since weights may be negative."""

    def coefficient(self, w, ids, e):
        return (torch.where(ids == e, w, -0.5)).amax(-1, keepdim=True)


@impostor(ANY)
class FillIsNotZero(Masked):
    def coefficient(self, w, ids, e):
        return torch.where(ids == e, w, 1e-3).sum(-1, keepdim=True)


@impostor(ANY)
class CombinedByMax(Masked):
    def combine(self, out, c, y):
        return torch.maximum(out, c * y)


@impostor(ANY)
class WeightBeforeANonlinearity(Masked):
    def combine(self, out, c, y):
        return out + (c * y).tanh()


@impostor(ANY)
class WeightInsideTheExpert(Loop):
    """The weight multiplies what is activated: no weigh of the Spec."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            pre = self.linear(x[token], "up", e) * w[token, k, None]
            out.index_add_(0, token, self.linear(self.activate(pre), "down", e))
        return out


@impostor(None)
class WeightOnTheHidden(Loop):
    """The weight multiplies the hidden units: as on the output, but for where it rounds."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            hidden = self.activate(self.linear(x[token], "up", e)) * w[token, k, None]
            out.index_add_(0, token, self.linear(hidden, "down", e))
        return out


@impostor(None)
class WeightSquared(Loop):
    def weight(self, w, token, k):
        return w[token, k].square()


@impostor(NOTHING)
class DenseMixture(Block):
    """No choice at all: every expert counts."""

    def experts(self, x, ids, w):
        probabilities = self.gate(x).softmax(-1)
        return sum(probabilities[:, e, None] * self.expert(x, e) for e in range(self.count))


@impostor(None)
class ThresholdRouting(Block):
    """Experts above a probability: no K."""

    def experts(self, x, ids, w):
        probabilities = self.gate(x).softmax(-1)
        routing = torch.where(probabilities > 0.2, probabilities, 0.0)
        return sum(routing[:, e, None] * self.expert(x, e) for e in range(self.count))


@impostor(None)
class ExpertChoice(Block):
    """The experts choose tokens."""

    def experts(self, x, ids, w):
        weights, tokens = self.gate(x).softmax(-1).topk(7, dim=0)
        out = torch.zeros_like(x)
        for e in range(self.count):
            out.index_add_(0, tokens[:, e], self.expert(x[tokens[:, e]], e) * weights[:, e, None])
        return out


@impostor(None)
class ScatteredWithoutZeros(Block):
    """The routing matrix is full of a small number where nothing was chosen."""

    def experts(self, x, ids, w):
        routing = x.new_full((x.shape[0], self.count), 1e-2).scatter(1, ids, w)
        return sum(routing[:, e, None] * self.expert(x, e) for e in range(self.count))


@impostor(None)
class ScatteredTwice(Block):
    """Choices fold onto three experts: with duplicates, scatter keeps one and scatter_add both."""

    def experts(self, x, ids, w):
        routing = x.new_zeros(x.shape[0], self.count).scatter_add(1, ids % 3, w)
        return sum(routing[:, e, None] * self.expert(x, e) for e in range(self.count))


@impostor(None)
class DuplicatesInOneToken(Loop):
    """Both choices of a token may be one expert: `out[token] +=` with a token twice counts it once."""

    def experts(self, x, ids, w):
        out, ids = torch.zeros_like(x), ids // 3
        for e in range(2):
            token, k = torch.where(ids == e)
            out = out.index_put((token,), out[token] + self.expert(x[token], e) * w[token, k, None])
        return out


@impostor(None)
class MaskAlsoByPadding(Masked):
    """Some tokens get nothing."""

    def coefficient(self, w, ids, e):
        keep = (torch.arange(w.shape[0]) < 15).unsqueeze(-1)
        return (w * ((ids == e) & keep)).sum(-1, keepdim=True)


@impostor(ANY)
class SigmoidOfTheFill(Llama4):
    """As Llama 4 with a fill of -3 instead of -inf: the others are not zero."""

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        best, ids = torch.topk(logits, self.top, dim=1)
        scores = torch.full_like(logits, -3.0).scatter_(1, ids, best).transpose(0, 1).sigmoid()
        routed = rows.repeat(self.count, 1) * scores.reshape(-1, 1)
        y = self.mlp(routed.view(self.count, -1, x.shape[-1]), lambda x, weight, bias: torch.bmm(x, weight))
        return y.sum(dim=0).view(x.shape)


@impostor(ANY)
class WeighedInputAndBias(Llama4):
    """Weighed by input, an expert that was not chosen still gives its bias."""

    bias = True

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        best, ids = torch.topk(logits, self.top, dim=1)
        scores = torch.zeros_like(logits).scatter_(1, ids, best.sigmoid()).transpose(0, 1)
        routed = rows.repeat(self.count, 1) * scores.reshape(-1, 1)

        def product(x, weight, bias):
            return torch.bmm(x, weight) + bias.unsqueeze(1)

        return self.mlp(routed.view(self.count, -1, x.shape[-1]), product).sum(0).view(x.shape)


# Positions


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
class TransposedMask(WhereIndexAdd):
    """one_hot without the permute: torch.where's parts are token and choice, used the other way round."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.count).permute(2, 0, 1)
        for e in range(self.count):
            k, token = torch.where(mask[e])
            out.index_add_(0, k, self.expert(x[token], e) * w[k, token, None])
        return out


@impostor(ANY)
class OffsetsOffByOne(Sorted):
    """The first expert gets one row less, and so on."""

    def offsets(self, ids_g):
        return (super().offsets(ids_g) - 1).clamp(min=0)

    def back(self, y, perm):
        return torch.where(torch.arange(y.shape[0])[:, None] < y.shape[0] - 1, y, 0.0)[perm.argsort()]


@impostor(ANY)
class HistcWithOneBinTooMany(Sorted):
    """max = E: all ids still fall into their own bins only if bins are E + 1."""

    def offsets(self, ids_g):
        counts = torch.histc(ids_g.float() + 0.5, bins=self.count, min=0, max=self.count + 1)
        return counts.cumsum(0, dtype=torch.int32)


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
        ids = torch.tensor([2, 0, 1, 5, 3, 4])[ids]
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
