"""Weights and ids that are not the router's, and sums that are none."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.moe_impostors.base import ANY, NOTHING, Loop, Masked, impostor
from tests.moe_spellings.base import Block
from tests.moe_spellings.dense import Llama4, Llama4OneByOne, MaskedTokens


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
    """Choices fold onto two experts: with duplicates, scatter keeps one and scatter_add both."""

    def experts(self, x, ids, w):
        routing = x.new_zeros(x.shape[0], self.count).scatter_add(1, ids % 2, w)
        return sum(routing[:, e, None] * self.expert(x, e) for e in range(self.count))


@impostor(None)
class DuplicatesInOneToken(Loop):
    """Both choices of a token may be one expert: `out[token] +=` with a token twice counts it once."""

    def experts(self, x, ids, w):
        out, ids = torch.zeros_like(x), ids // 2
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
class SigmoidOfTheFillOneByOne(Llama4OneByOne):
    fill = -3.0


@impostor(ANY)
class ActivationOfZeroOneByOne(Llama4OneByOne):
    def activate(self, pre, gate=None):
        g, u = pre.chunk(2, -1)
        return g.sigmoid() * (u + 1)


@impostor(ANY)
class ScoresOfTheNextExpert(Llama4OneByOne):
    """The last expert reads its own column, which the one before reads too; the first one's is read by none."""

    def column(self, e):
        return min(e + 1, self.count - 1)


@impostor(ANY)
class ActivationOfZero(Llama4):
    """Weighed by input, where the activation of zeros is not zero: experts that were not chosen count."""

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        best, ids = torch.topk(logits, self.top, dim=1)
        scores = torch.zeros_like(logits).scatter_(1, ids, best.sigmoid()).transpose(0, 1)
        routed = (rows.repeat(self.count, 1) * scores.reshape(-1, 1)).view(self.count, -1, x.shape[-1])
        g, u = torch.bmm(routed, self.w_up).chunk(2, -1)
        return torch.bmm(g.sigmoid() * (u + 1), self.w_down).sum(0).view(x.shape)


@impostor(ANY)
class SoftmaxOfZeros(Masked):
    """The chosen logits among zeros instead of -inf: no expert's weight is zero."""

    def experts(self, x, ids, w):
        routing = x.new_zeros(x.shape[0], self.count).scatter(-1, ids, w).softmax(-1)
        return sum(routing[:, e, None] * self.expert(x, e) for e in range(self.count))


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


@impostor(ANY)
class ReplacedByTheLastExpert(Loop):
    """Results are put, not added: of a token's experts the last one counts."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out[token] = self.expert(x[token], e) * w[token, k, None]
        return out


@impostor(None)
class ReplacedByTheSecondChoice(Loop):
    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for k in range(self.top):
            for e in range(self.count):
                mask = ids[:, k] == e
                out[mask] = self.expert(x[mask], e) * w[mask, k, None]
        return out


class ByColumn(Loop):
    """Top-1, weighed by a column of the probabilities."""

    top, router = 1, "top1"

    def experts(self, x, ids, w):
        out, probabilities = torch.zeros_like(x), self.gate(x).softmax(-1)
        for e in range(self.count):
            (token,) = torch.where(ids[:, 0] == e)
            out = out.index_add(0, token, self.expert(x[token], e) * probabilities[token, self.column(e), None])
        return out


@impostor(None)
class ColumnOfTheNextExpert(ByColumn):
    def column(self, e):
        return (e + 1) % self.count


@impostor(None)
class OneColumnForAll(ByColumn):
    def column(self, e):
        return 1


@impostor(None)
class ScatteredAtIdsThatMeet(Block):
    """Ids that are data may be the same twice in a row: the scatter keeps one of the weights."""

    def __init__(self):
        super().__init__()
        self.table = nn.Buffer(torch.tensor([0, 0, 1, 3, 2, 2]).view(3, 2).repeat(7, 1))

    def experts(self, x, ids, w):
        dense = torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter(1, self.table, w)
        return sum(dense[:, e, None] * self.expert(x, e) for e in range(self.count))


@impostor(None)
class AddedWithAFactor(Loop):
    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token], e) * w[token, k, None], alpha=1.5)
        return out


@impostor(None)
class IdsCountFromTheEnd(Block):
    """Ids that are data: -1 is the last expert of a gather."""

    def __init__(self):
        super().__init__()
        self.table = nn.Buffer(torch.tensor([0, -1, -3, 3, 2, -4]).view(3, 2).repeat(7, 1))

    def experts(self, x, ids, w):
        pre = torch.einsum("th,tkhf->tkf", x, self.w_up[self.table])
        y = torch.einsum("tkf,tkfh->tkh", self.activate(pre), self.w_down[self.table])
        return (y * w.unsqueeze(-1)).sum(1)


@impostor(None)
class TokensOfOtherChoices(MaskedTokens):
    """Weights and tokens go by different ids."""

    def sent(self, ids):
        return super().sent((ids + 1) % self.count)


@impostor(None)
class TokensOfTheFirstChoice(MaskedTokens):
    def sent(self, ids):
        return super().sent(ids[:, :1])


@impostor(ANY)
class TokensAddedTwice(MaskedTokens):
    """Two choices may be one expert, which is then given twice the token."""

    def route(self, x):
        return x[:, -2:].sigmoid(), x[:, : 2 * self.count].view(-1, 2, self.count).argmax(-1)

    def matrix(self, ids, w):
        return (F.one_hot(ids, self.count) * w.unsqueeze(-1)).sum(1)


class TwoMatrices(Block):
    """Rows and weights of two routings, scattered into matrices of their own."""

    router, kind = "sigmoid_topk", "relu"

    def experts(self, x, ids, w):
        other = torch.topk(self.gate(x.flip(0)), self.top, dim=-1).indices
        g, f = (x.new_zeros(x.shape[0], self.count).scatter(1, i, w) for i in (ids, other))
        probabilities, out = self.gate(x).softmax(-1), torch.zeros_like(x)
        chosen = self.chosen(g, f)
        for e in range(self.count):
            (token,) = torch.where(chosen[:, e])
            out = out.index_add(0, token, self.expert(x[token], e) * probabilities[token, e, None])
        return out


@impostor(None)
class ChosenByEither(TwoMatrices):
    def chosen(self, g, f):
        return g + f > 0


@impostor(None)
class ChosenByTheGreater(TwoMatrices):
    def chosen(self, g, f):
        return g > -f


@impostor(ANY)
class ScatteredIntoFewerRows(Block):
    """The last tokens have no ids."""

    def experts(self, x, ids, w):
        w, ids = self.route(x[:9])
        g, out = x.new_zeros(x.shape[0], self.count).scatter(1, ids, w), torch.zeros_like(x)
        for e in range(self.count):
            out = out + g[:, e, None] * self.expert(x, e)
        return out


@impostor(ANY)
class AddedToMinusInfinity(Block):
    """Weights that are nowhere."""

    def experts(self, x, ids, w):
        g = x.new_full((x.shape[0], self.count), -torch.inf).scatter_add(1, ids, w).sigmoid()
        return sum(g[:, e, None] * self.expert(x, e) for e in range(self.count))


@impostor(ANY)
class OneNumberAsBias(Block):
    kind = "relu"

    def __init__(self):
        super().__init__()
        self.numbers = nn.Parameter(torch.randn(self.count))

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            y = (x @ self.w_up[e] + self.numbers[e]).relu() @ self.w_down[e]
            out = out + (w * (ids == e)).sum(-1, keepdim=True) * y
        return out
