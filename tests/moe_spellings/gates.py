"""No ids and no comparison: weights that are zero where a ReLU, a clamp or a masked softmax closed their gate."""

import torch
import torch.nn.functional as F

from tests.moe_spellings.base import Block, moe


class Gated(Block):
    """gates [T,E] of logits; `weighed` sums up the experts with them."""

    def gates(self, logits):
        return F.relu(logits)

    def coefficients(self, x):
        return self.gates(self.gate(x))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        return self.weighed(flat, self.gates(self.gate(flat))).view(x.shape)

    def weighed(self, x, gates):
        return (torch.stack([self.expert(x, e) for e in range(self.count)], 1) * gates[..., None]).sum(1)

    def all_experts(self, x):
        return self.mlp(x.expand(self.count, *x.shape), lambda x, W, b: x @ W if b is None else x @ W + b[:, None])


def below_the_kth(logits, top=2):
    return logits < logits.topk(top, dim=-1).values[:, -1:]


@moe(own=True, bias=True)
@moe(own=True, kind="gelu")
class ReluOfLogits(Gated):
    pass


@moe(kind="relu", bias=True)
class ReluToASumOfOne(Gated):
    def gates(self, logits):
        gates = F.relu(logits)
        return gates / (gates.sum(-1, keepdim=True) + 1e-6)

    def weighed(self, x, gates):
        return torch.einsum("te,eth->th", gates, self.all_experts(x))


@moe(kind="gelu")
class GatesOfTheHidden(Gated):
    """The squares of what a ReLU let through weigh the activations."""

    def weighed(self, x, gates):
        h = F.gelu(torch.einsum("th,ehf->tef", x, self.w_up)) * gates.square()[..., None]
        return torch.einsum("tef,efh->th", h, self.w_down)

    def coefficients(self, x):
        return self.gates(self.gate(x)).square()


@moe(own=True, bias=True)
class SoftmaxOfTheKept(Gated):
    def gates(self, logits):
        return logits.masked_fill(below_the_kth(logits), -torch.inf).softmax(-1)

    def weighed(self, x, gates):
        return sum(gates[:, e : e + 1] * self.expert(x, e) for e in range(self.count))


@moe(kind="gelu", bias=True)
class SoftmaxUnderAnAddedMask(Gated):
    def gates(self, logits):
        return (logits + torch.where(below_the_kth(logits), -torch.inf, 0.0)).softmax(-1)

    def weighed(self, x, gates):
        return torch.einsum("te,eth->th", gates, self.all_experts(x))


@moe(own=True, kind="relu")
class SoftmaxOfWhatIsWrittenOver(Gated):
    def gates(self, logits):
        logits[below_the_kth(logits)] = -1e9
        return logits.softmax(-1)


@moe(own=True, kind="gelu")
class SigmoidOfTheKept(Gated):
    def gates(self, logits):
        return logits.masked_fill(logits < 0, -torch.inf).sigmoid()


@moe(kind="gelu")
class Sparsemax(Gated):
    """The projection onto the simplex, https://arxiv.org/abs/1602.02068."""

    def gates(self, logits):
        ordered, count = logits.sort(-1, descending=True).values, torch.arange(1, self.count + 1, dtype=logits.dtype)
        sums = ordered.cumsum(-1)
        support = (1 + count * ordered > sums).sum(-1, keepdim=True)
        return (logits - (sums.gather(-1, support - 1) - 1) / support).clamp(min=0)

    def weighed(self, x, gates):
        return torch.einsum("te,eth->th", gates, self.all_experts(x))


@moe(own=True, bias=True)
class ClearedOnBothSides(Gated):
    def weighed(self, x, gates):
        out = torch.zeros_like(x)
        for e in range(self.count):
            kept = (gates[:, e : e + 1] > 0.2).to(x.dtype)
            out = out + self.expert(x * kept, e) * kept * gates[:, e : e + 1]
        return out

    def coefficients(self, x):
        gates = self.gates(self.gate(x))
        return gates * (gates > 0.2)


@moe(own=True, kind="gelu")
class ClearedBefore(ClearedOnBothSides):
    """Zeros give zeros."""

    def weighed(self, x, gates):
        kept = (gates > 0.2).to(x.dtype)
        return sum(self.expert(x * kept[:, [e]], e) * gates[:, [e]].sigmoid() for e in range(self.count))

    def coefficients(self, x):
        gates = self.gates(self.gate(x))
        return gates.sigmoid() * (gates > 0.2)
