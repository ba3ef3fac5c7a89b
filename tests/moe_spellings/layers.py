"""A mixture of experts inside a layer: shared experts, losses of the router, residuals."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.moe_spellings.base import B, Block, Expert, H, S, T, moe
from tests.moe_spellings.batched import Einsums
from tests.moe_spellings.dense import MaskedSum
from tests.moe_spellings.grouped import SortHistcInverse
from tests.moe_spellings.loops import WhereIndexAdd

FORMS = (SortHistcInverse, WhereIndexAdd, MaskedSum, Einsums)


def balance(probabilities, ids, count):
    """Switch and GShard: experts' share of the tokens times their mean probability."""
    share = F.one_hot(ids, count).float().mean((0, 1))
    return count * (share * probabilities.mean(0)).sum()


class Shared:
    """A shared expert with a gate of its own, as in Qwen2-MoE."""

    def __init__(self):
        super().__init__()
        self.shared, self.shared_gate = Expert("swiglu", False), nn.Linear(H, 1, bias=False)

    def forward(self, x):
        return super().forward(x) + torch.sigmoid(self.shared_gate(x)) * self.shared(x)

    def reference(self, x):
        return super().reference(x) + torch.sigmoid(self.shared_gate(x)) * self.shared(x)


class Losses:
    """Beside the output: the load-balancing loss and the z-loss."""

    def forward(self, x):
        flat = x.reshape(-1, H)
        logits = self.gate(flat)
        w, ids = torch.topk(logits.float().softmax(-1), self.top, dim=-1)
        w = (w / w.sum(-1, keepdim=True)).to(x.dtype)
        out = self.experts(flat, ids, w).view(x.shape)
        return out, *self.losses(logits, ids)

    def route(self, x):
        w, ids = torch.topk(self.gate(x).float().softmax(-1), self.top, dim=-1)
        return (w / w.sum(-1, keepdim=True)).to(x.dtype), ids

    def losses(self, logits, ids):
        z = 1e-2 * torch.logsumexp(logits.float(), dim=-1).square().mean()
        return balance(logits.float().softmax(-1), ids, self.count), z

    def reference(self, x):
        logits, ids = self.gate(x.reshape(-1, H)), self.route(x.reshape(-1, H))[1]
        return super().reference(x), *self.losses(logits, ids)


class Residual:
    """Norm before, the output scaled and added to what came in, router logits returned."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(H)

    def route(self, x):
        return super().route(x)

    def forward(self, x):
        y = self.norm(x)
        flat = y.view(-1, H)
        w, ids = self.route(flat)
        return x + 0.5 * self.experts(flat, ids, w).view(x.shape), self.gate(flat)

    def reference(self, x):
        y = self.norm(x)
        return x + 0.5 * super().reference(y), self.gate(y.view(-1, H))


class TokensFirst:
    """x is [T,H] from the start."""

    def forward(self, x):
        w, ids = self.route(x)
        return self.experts(x, ids, w)


class Begun(Shared, Block):
    """The sum begins with what the shared expert gives, or with the residual."""

    def forward(self, x):
        return Block.forward(self, x)

    def begin(self, x):
        return torch.sigmoid(self.shared_gate(x)) * self.shared(x)


@moe(modes=("train",))
@moe(own=True)
class SharedThenDense(Begun):
    def experts(self, x, ids, w):
        out = self.begin(x)
        for e in range(self.count):
            out = out + (w * (ids == e)).sum(-1, keepdim=True) * self.expert(x, e)
        return out


@moe(modes=("train",))
@moe(own=True, kind="gelu", bias=True)
class SharedThenRows(Begun):
    def experts(self, x, ids, w):
        out = self.begin(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token], e) * w[token, k, None])
        return out


@moe(own=True)
class ResidualThenDense(SharedThenDense):
    def begin(self, x):
        return x

    def reference(self, x):
        return Block.reference(self, x) + x


@moe(own=True)
@moe(kind="relu")
class SummedInPairs(ResidualThenDense):
    """Half of the experts are a sum of their own, and are no mixture beside the other half."""

    def experts(self, x, ids, w):
        y = [(w * (ids == e)).sum(-1, keepdim=True) * self.expert(x, e) for e in range(self.count)]
        return (x + y[2] + y[3]) + (y[0] + y[1])


for mixin, shape in ((Shared, (B, S, H)), (Losses, (B, S, H)), (Residual, (B, S, H)), (TokensFirst, (T, H))):
    for form in FORMS:
        name = f"{mixin.__name__}{form.__name__}"
        made = type(name, (mixin, form), {"__module__": __name__})
        moe(shape, modes=("train",))(made)


@moe(own=True, router="renormalised")
class FirstTokens(WhereIndexAdd):
    """The first tokens alone go through the experts."""

    def experts(self, x, ids, w):
        return torch.cat([super().experts(x[:9], ids[:9], w[:9]), x[9:]])

    def reference(self, x):
        flat = x.reshape(-1, H)
        return torch.cat([super().reference(flat)[:9], flat[9:]]).view(x.shape)


@moe(order="oi")
class WithoutPadding(WhereIndexAdd):
    """Tokens that a mask left, routed by themselves."""

    def forward(self, x):
        flat = x.reshape(-1, H)
        kept, out = flat[:, 0] > -0.5, torch.zeros_like(flat)
        rows = flat[kept]
        w, ids = self.route(rows)
        out[kept] = self.experts(rows, ids, w)
        return out.view(x.shape)

    def reference(self, x):
        return torch.where(x[..., :1] > -0.5, super().reference(x), 0.0)
