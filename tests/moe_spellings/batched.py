"""Every pair gathers its expert's weights: W[ids], or a one-hot times W, and a batched product."""

import torch
import torch.nn.functional as F

from tests.moe_spellings.base import Block, moe


@moe()
@moe(order="oi", router="renormalised")
@moe(kind="gpt_oss", layout="interleave", bias=True, router="topk_softmax")
@moe(kind="relu", layout="plain", bias=True, order="oi")
@moe(router="skipping")
@moe(router="clamped", kind="gelu")
@moe(layout="separate", router="grouped")
class Transformers(Block):
    """transformers' batched_mm implementation, by hand."""

    def experts(self, x, ids, w):
        rows, flat = x.repeat_interleave(self.top, dim=0), ids.reshape(-1)

        def product(rows, weight, bias):
            if self.order == "io":
                y = torch.bmm(rows.unsqueeze(1), weight[flat]).squeeze(1)
            else:
                y = torch.bmm(weight[flat], rows.unsqueeze(-1)).squeeze(-1)
            return y if bias is None else y.add_(bias[flat])

        y = self.mlp(rows, product) * w.reshape(-1).unsqueeze(-1)
        return y.view(x.shape[0], self.top, -1).sum(dim=1).to(x.dtype)


@moe()
@moe(kind="geglu", layout="separate", order="oi", bias=True)
class Einsums(Block):
    """gpt-fast: [T,K,out,in] weights."""

    def experts(self, x, ids, w):
        def product(x, weight, bias):
            tokens = "ti" if x.dim() == 2 else "tki"
            y = torch.einsum(f"{tokens},tk{'io' if self.order == 'io' else 'oi'}->tko", x, weight[ids])
            return y if bias is None else y + bias[ids]

        return torch.einsum("tkh,tk->th", self.mlp(x, product), w)


@moe()
@moe(kind="gelu", order="oi", router="norm_p1")
class BroadcastMatmul(Block):
    def experts(self, x, ids, w):
        def product(x, weight, bias):
            return x @ (weight[ids] if self.order == "io" else weight[ids].mT)

        y = self.mlp(x[:, None, None, :], product).squeeze(2)
        return (y * w[..., None]).sum(1)


@moe(bias=True)
@moe(kind="silu", bias=True)
class BaddbmmAndIndexSelect(Block):
    def experts(self, x, ids, w):
        flat = ids.flatten()

        def product(rows, weight, bias):
            return torch.baddbmm(bias.index_select(0, flat).unsqueeze(1), rows, weight.index_select(0, flat))

        rows = x.unsqueeze(1).expand(-1, self.top, -1).reshape(-1, 1, x.shape[-1])
        return (self.mlp(rows, product).view(*ids.shape, -1) * w.unsqueeze(-1)).sum(-2)


@moe()
@moe(order="oi", layout="interleave")
class OneChoiceAtATime(Block):
    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for k in range(self.top):

            def product(x, weight, bias, k=k):
                weight = weight[ids[:, k]]
                return torch.bmm(weight.mT if self.order == "io" else weight, x)

            mlp = self.activated_columns(x.unsqueeze(-1), product)
            out = out + mlp.squeeze(-1) * w[:, k : k + 1]
        return out

    def activated_columns(self, x, product):
        """`mlp` of columns [T,H,1]."""
        pre = product(x, self.w_up, None).squeeze(-1)
        return product(self.activate(pre).unsqueeze(-1), self.w_down, None)


@moe(router="top1")
@moe(router="top1_sigmoid", kind="relu", order="oi")
class TopOne(Block):
    top = 1

    def experts(self, x, ids, w):
        ids = ids.squeeze(1)

        def product(x, weight, bias):
            return torch.einsum("th,thf->tf" if self.order == "io" else "th,tfh->tf", x, weight[ids])

        return self.mlp(x, product) * w


@moe()
class Embedding(Block):
    """The experts' weights as rows of an embedding."""

    def experts(self, x, ids, w):
        def product(x, weight, bias):
            chosen = F.embedding(ids, weight.flatten(1)).unflatten(-1, weight.shape[1:])
            return torch.matmul(x, chosen)

        y = self.mlp(x.view(x.shape[0], 1, 1, -1).expand(-1, self.top, -1, -1), product)
        return torch.matmul(w.unsqueeze(1), y.squeeze(2)).squeeze(1)


@moe(three=True)
@moe(three=True, kind="gelu_tanh")
class ThreeDims(Block):
    """x [B,S,H], ids [B,S,K] throughout."""

    def experts(self, x, ids, w):
        def product(x, weight, bias):
            return torch.einsum("bski,bskio->bsko", x, weight[ids])

        y = self.mlp(x.unsqueeze(2).expand(-1, -1, self.top, -1), product)
        return torch.einsum("bskh,bsk->bsh", y, w)


class OneHots(Block):
    """Experts chosen by sums over a one-hot instead of an index."""

    def one_hot(self, ids, dtype):
        return F.one_hot(ids, self.count).to(dtype)

    def experts(self, x, ids, w):
        hot = self.one_hot(ids, x.dtype)
        y = self.mlp(x[:, None].expand(-1, self.top, -1), lambda x, weight, bias: self.chosen(hot, x, weight, bias))
        return torch.einsum("tkh,tk->th", y, w)


@moe()
@moe(order="oi", kind="gelu", bias=True)
class ThreeFactors(OneHots):
    """einsum of the one-hot, the tokens and the weights"""

    def chosen(self, hot, x, weight, bias):
        y = torch.einsum("tke,tki,eio->tko" if self.order == "io" else "tke,tki,eoi->tko", hot, x, weight)
        return y if bias is None else y + hot @ bias


@moe(layout="separate")
@moe(router="top1", top=1, kind="relu")
class WeightsByMatmul(OneHots):
    def one_hot(self, ids, dtype):
        return (ids[..., None] == torch.arange(self.count)).to(dtype)

    def chosen(self, hot, x, weight, bias):
        weights = (hot.flatten(0, 1) @ weight.flatten(1)).view(*hot.shape[:2], *weight.shape[1:])
        return torch.einsum("tki,tkio->tko", x, weights)


@moe(router="top1", top=1)
@moe(router="top1", top=1, kind="gelu", bias=True)
class SetToOne(ThreeFactors):
    def one_hot(self, ids, dtype):
        return torch.zeros(ids.shape[0], 1, self.count, dtype=dtype).scatter_(-1, ids[..., None], 1.0)


@moe(router="top1", top=1, kind="relu")
class WeightInTheOneHot(OneHots):
    def experts(self, x, ids, w):
        hot = self.one_hot(ids[:, 0], x.dtype)
        h = torch.einsum("te,ti,eio->to", hot, x, self.w_up).relu()
        return torch.einsum("te,ti,eio->to", hot * w, h, self.w_down)
