"""Every expert on every token; what was not chosen is multiplied by zero."""

import torch
import torch.nn.functional as F

from tests.moe_spellings.base import Block, moe


@moe()
@moe(own=True)
@moe(kind="gpt_oss", layout="interleave", bias=True, router="topk_softmax")
@moe(kind="gelu", order="oi", bias=True)
@moe(layout="separate", order="oi", router="renormalised")
class MaskedSum(Block):
    """The coefficient of expert e: (weights * (ids == e)).sum(-1)."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            coefficient = (w * (ids == e)).sum(dim=-1, keepdim=True)
            out = out + coefficient * self.expert(x, e)
        return out


@moe()
@moe(own=True, kind="relu")
@moe(order="oi", kind="reglu", router="in_float")
@moe(router="sorted_softmax")
@moe(top=1, router="top1", bias=True)
class ScatteredRouting(Block):
    """A dense [T,E] routing matrix."""

    def experts(self, x, ids, w):
        routing = torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter(1, ids, w)
        out = torch.zeros_like(x)
        for e in range(self.count):
            out = out + (routing[:, e, None] * self.expert(x, e)).to(x.dtype)
        return out


@moe()
@moe(own=True, router="argmax_twice")
class WhereElementwise(Block):
    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            hit = ids == e
            y = self.expert(x, e) * torch.where(hit, w, 0.0).sum(-1).unsqueeze(-1)
            out += torch.where(hit.any(-1, keepdim=True), y, torch.zeros_like(y))
        return out


@moe()
@moe(own=True, kind="gelu")
class StackedEinsum(Block):
    def experts(self, x, ids, w):
        routing = torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter_(1, ids, w)
        ys = torch.stack([self.expert(x, e) for e in range(self.count)])
        return torch.einsum("te,eth->th", routing, ys)


@moe()
@moe(own=True, bias=True)
class StackedGather(Block):
    """The outputs of all experts, of which those chosen are gathered."""

    def experts(self, x, ids, w):
        ys = torch.stack([self.expert(x, e) for e in range(self.count)], dim=1)
        chosen = ys.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return (chosen * w.unsqueeze(-1)).sum(dim=1)


@moe()
@moe(own=True, layout="separate")
class StackedIndexed(Block):
    def experts(self, x, ids, w):
        ys = torch.stack([self.expert(x, e) for e in range(self.count)], dim=1)
        chosen = ys[torch.arange(x.shape[0])[:, None], ids]
        return torch.einsum("tkh,tk->th", chosen, w)


@moe()
@moe(kind="geglu", layout="separate", order="oi", bias=True)
@moe(kind="gpt_oss", layout="interleave", bias=True, router="topk_softmax")
class Einsums(Block):
    """All experts by einsum over stacked weights; combined with a one-hot."""

    def experts(self, x, ids, w):
        def product(x, weight, bias):
            left = "ti" if x.dim() == 2 else "tei"
            y = torch.einsum(f"{left},{'eio' if self.order == 'io' else 'eoi'}->teo", x, weight)
            return y if bias is None else y + bias

        chosen = F.one_hot(ids, self.count).to(w.dtype)
        return torch.einsum("tk,tke,teh->th", w, chosen, self.mlp(x, product))


@moe()
@moe(kind="gpt_oss", layout="interleave", bias=True, router="topk_softmax")
@moe(kind="relu", order="oi")
class RepeatedBmm(Block):
    """GPT-OSS in inference, before version 5: tokens repeated for every expert, bmm, routing matrix."""

    def experts(self, x, ids, w):
        routing = torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter_(1, ids, w)
        rows = x.repeat(self.count, 1).view(self.count, -1, x.shape[-1])

        def product(x, weight, bias):
            y = torch.bmm(x, weight if self.order == "io" else weight.mT)
            return y if bias is None else y + bias[..., None, :]

        y = self.mlp(rows, product) * routing.transpose(0, 1)[..., None]
        return y.sum(dim=0)


@moe()
@moe(kind="gelu", bias=True)
class BroadcastMatmul(Block):
    def experts(self, x, ids, w):
        routing = (F.one_hot(ids, self.count) * w.unsqueeze(-1)).sum(1)

        def product(x, weight, bias):
            y = x @ (weight if self.order == "io" else weight.mT)
            return y if bias is None else y + bias.unsqueeze(1)

        return (self.mlp(x.unsqueeze(0), product) * routing.T.unsqueeze(-1)).sum(0)


@moe()
class Llama4(Block):
    """Dense bmm; the input is weighed by the sigmoid of the only logit that is not -inf."""

    router, top, weigh = "top1_sigmoid", 1, "input"

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        best, ids = torch.topk(logits, self.top, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, ids, best).transpose(0, 1)
        scores = torch.sigmoid(scores.float()).to(x.dtype)
        routed = rows.repeat(self.count, 1) * scores.reshape(-1, 1)
        y = self.mlp(routed.view(self.count, -1, x.shape[-1]), lambda x, weight, bias: torch.bmm(x, weight))
        return y.sum(dim=0).view(x.shape)


@moe()
@moe(own=True)
@moe(kind="gelu", order="oi")
@moe(layout="separate", router="sigmoid_each", top=2)
class Llama4OneByOne(Llama4):
    """The same in a loop: every expert reads all tokens times a column of the scores."""

    fill = float("-inf")

    def column(self, e):
        return e

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        best, ids = torch.topk(logits, self.top, dim=1)
        scores = torch.full_like(logits, self.fill).scatter_(1, ids, best).sigmoid()
        weighed = (rows * scores[:, c : c + 1] for c in map(self.column, range(self.count)))
        return sum(self.expert(x, e) for e, x in enumerate(weighed)).view(x.shape)


@moe()
class Llama4TopTwo(Llama4):
    router, top = "sigmoid_each", 2


@moe(three=True)
@moe(three=True, own=True)
class ThreeDims(Block):
    def experts(self, x, ids, w):
        out = 0
        for e in range(self.count):
            out = out + self.expert(x, e) * (w * (ids == e).to(w.dtype)).sum(-1, keepdim=True)
        return out


@moe()
@moe(own=True, kind="relu", bias=True)
class SoftmaxOfScattered(Block):
    """The chosen logits among -inf, then a softmax over all experts: zero where nothing was chosen."""

    router = "topk_softmax"

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        logits = self.gate(flat)
        best, ids = logits.topk(self.top, dim=-1)
        routing = torch.full_like(logits, float("-inf")).scatter(-1, ids, best).softmax(dim=-1)
        ys = torch.stack([self.expert(flat, e) for e in range(self.count)], dim=1)
        return torch.einsum("te,teh->th", routing, ys).view(x.shape)


@moe()
@moe(kind="gelu", order="oi")
class EinsumOfThree(Block):
    """The combine is in the last product."""

    def experts(self, x, ids, w):
        gates = (F.one_hot(ids, self.count).to(w.dtype) * w.unsqueeze(-1)).sum(-2)
        up, down = ("eio", "efh") if self.order == "io" else ("eoi", "ehf")
        h = self.activate(torch.einsum(f"ti,{up}->teo", x, self.w_up))
        return torch.einsum(f"tef,{down},te->th", h, self.w_down, gates)


@moe()
@moe(kind="gelu", order="oi", bias=True)
@moe(router="sigmoid_topk", layout="separate")
class MaskedTokens(Block):
    """Every expert is given the tokens that chose it among zeros, by a product without a sum."""

    def sent(self, ids):
        """[T,E]: 1 where a token chose an expert."""
        return F.one_hot(ids, self.count).sum(1)

    def matrix(self, ids, w):
        """[T,E]: weights, 0 where an expert was not chosen."""
        return torch.zeros(ids.shape[0], self.count, dtype=w.dtype).scatter(1, ids, w)

    def experts(self, x, ids, w):
        rows = torch.einsum("th,te->eth", x, self.sent(ids).to(x.dtype))

        def product(x, weight, bias):
            y = torch.bmm(x, weight if self.order == "io" else weight.mT)
            return y if bias is None else y + bias[:, None]

        return torch.einsum("eth,te->th", self.mlp(rows, product), self.matrix(ids, w))


class OneOfAll(Block):
    """Of the results of all experts the one that a token chose; weighed at the end."""

    router, top = "top1", 1

    def choose(self, ids, ys):
        """ids [T], ys: E results [T,H]"""
        raise NotImplementedError

    def experts(self, x, ids, w):
        return w * self.choose(ids.squeeze(-1), [self.expert(x, e) for e in range(self.count)])


@moe(kind="gelu", bias=True)
@moe(own=True, router="top1_argmax")
class WhereFromZeros(OneOfAll):
    def choose(self, ids, ys):
        out = torch.zeros_like(ys[0])
        for e, y in enumerate(ys):
            out = torch.where((ids == e)[:, None], y, out)
        return out


@moe(kind="relu", order="oi")
@moe(own=True, router="top1_argmax")
class WhereFromTheFirst(OneOfAll):
    """The first expert's where no other one was chosen."""

    def choose(self, ids, ys):
        out = ys[0]
        for e in range(1, self.count):
            out = torch.where((ids == e)[:, None], ys[e], out)
        return out


@moe(own=True, kind="gelu", bias=True)
class IndexedStack(OneOfAll):
    def choose(self, ids, ys):
        return torch.stack(ys)[ids, torch.arange(len(ids))]


@moe()
@moe(kind="relu", order="oi")
class EinsumOverExperts(Block):
    """Weighed before the last projection, which adds up features and experts at once."""

    def experts(self, x, ids, w):
        io = self.order == "io"
        routing = torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter(1, ids, w).to(x.dtype)
        h = self.activate(torch.einsum("th,ehf->tef" if io else "th,efh->tef", x, self.w_up))
        return torch.einsum("te,tef,efh->th" if io else "te,tef,ehf->th", routing, h, self.w_down)


@moe()
@moe(own=True, kind="silu")
class MaskedAboveAThreshold(Block):
    """Weights of a matrix [T,E] that do not reach a threshold are left out."""

    def coefficients(self, x):
        c = super().coefficients(x)
        return torch.where(c > 0.3, c, 0.0)

    def experts(self, x, ids, w):
        matrix, out = torch.zeros(x.shape[0], self.count, dtype=w.dtype).scatter(1, ids, w), torch.zeros_like(x)
        for e in range(self.count):
            c = torch.where(matrix[:, e] > 0.3, matrix[:, e], 0.0)
            out = out + self.expert(x, e) * c[:, None]
        return out


@moe()
@moe(own=True, three=True, kind="gelu", bias=True)
class WeightsColumnByColumn(Block):
    """The matrix of weights is scattered one choice after the other, as it is in books."""

    def experts(self, x, ids, w):
        matrix = torch.zeros(*x.shape[:-1], self.count, dtype=w.dtype)
        for k in range(self.top):
            matrix.scatter_(dim=-1, index=ids[..., k : k + 1], src=w[..., k : k + 1])
        y = torch.cat([self.expert(x, e).unsqueeze(-2) for e in range(self.count)], dim=-2)
        return (matrix.unsqueeze(-1) * y).sum(dim=-2)


@moe()
@moe(own=True, kind="gelu", bias=True)
class MatrixForEachExpert(Block):
    """Every expert's weight is read from a matrix that is computed anew for it."""

    def experts(self, x, ids, w):
        return sum(self.matrix(x, ids)[..., e, None] * self.expert(x, e) for e in range(self.count))

    def matrix(self, x, ids):
        probabilities = self.gate(x).softmax(-1)
        mask = torch.zeros_like(probabilities).scatter(-1, ids, 1.0)
        return probabilities * mask / (probabilities * mask).sum(-1, keepdim=True)

    def coefficients(self, x):
        return self.matrix(x, self.route(x)[1])


@moe()
@moe(own=True, kind="gelu", bias=True)
class ScaledByAFloat(Block):
    """A number of the module's own, which may change between calls where sizes may."""

    scaling = 1.5

    def coefficients(self, x):
        return self.scaling * super().coefficients(x)

    def experts(self, x, ids, w):
        out, w = torch.zeros_like(x), w * self.scaling
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token], e) * w[token, k, None])
        return out


@moe(router="topk_softmax")
@moe(router="topk_softmax", own=True, kind="relu", fill=None)
@moe(router="topk_softmax", kind="gelu", bias=True, fill=float("-inf"))
class SoftmaxOfTheChosen(Block):
    """What was not chosen is filled with a low number before the softmax, the lowest for None."""

    fill = -1e9

    def logits(self, x, ids):
        logits = self.gate(x)
        fill = torch.finfo(logits.dtype).min if self.fill is None else self.fill
        return logits.masked_fill(torch.zeros_like(logits).scatter(1, ids, 1.0) == 0, fill)

    def experts(self, x, ids, w):
        weights = self.logits(x, ids).softmax(-1)
        return sum(weights[:, e, None] * self.expert(x, e) for e in range(self.count))


@moe(router="topk_softmax", kind="relu")
@moe(router="topk_softmax", own=True)
class SoftmaxOfWhatIsSet(SoftmaxOfTheChosen):
    def logits(self, x, ids):
        logits = self.gate(x)
        return torch.full_like(logits, self.fill).scatter(1, ids, logits.gather(1, ids))


@moe(router="argmax_twice")
@moe(router="argmax_twice", own=True, kind="relu")
@moe(router="argmax_twice", kind="gelu", counted=torch.float32)
class OneHotsTimesProbabilities(Block):
    """Weights are the probabilities where one of two one-hots is 1, over their sum."""

    counted = torch.int64

    def experts(self, x, ids, w):
        first, second = (F.one_hot(ids[:, k], self.count).to(self.counted) for k in range(2))
        weights = self.gate(x).softmax(-1) * (first + second).to(x.dtype)
        weights = weights / weights.sum(-1, keepdim=True)
        return sum(weights[:, e, None] * self.expert(x, e) for e in range(self.count))


@moe(kind="gelu")
class ByTensordot(Block):
    """Both projections of all experts, the last one with the sum over them."""

    def experts(self, x, ids, w):
        gates = torch.zeros(len(x), self.count, dtype=w.dtype).scatter(1, ids, w)
        h = self.activate(torch.tensordot(x, self.w_up, dims=([1], [1])))
        return torch.tensordot(h * gates[..., None], self.w_down, dims=([-1, 1], [1, 0]))


@moe()
class ByTensordotOfNeighbours(Block):
    def experts(self, x, ids, w):
        gates = torch.zeros(len(x), self.count, dtype=w.dtype).scatter(1, ids, w)
        h = self.activate(torch.tensordot(x, self.w_up.transpose(0, 1), dims=1))
        return torch.tensordot(h * gates[..., None], self.w_down, dims=2)
