"""Experts that are not all alike, or no function of one row."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.moe_impostors.base import ANY, Loop, Masked, impostor
from tests.moe_spellings.base import FF, Expert, H
from tests.moe_spellings.loops import WeighedInside


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
        self.list[1].w_down = nn.Linear(FF, H, bias=True)


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
class HiddenScaledByItsToken(Masked):
    """A factor of the token before a nonlinearity: no function of gate and up."""

    def one(self, x, e):
        g, u = self.linear(x, "up", e).chunk(2, -1)
        return self.linear(F.silu(g * x[:, :1]) * u, "down", e)


@impostor(ANY)
class HalvesHaveBiasesOfTheirOwn(Masked):
    def __init__(self):
        super().__init__()
        self.b_g, self.b_u = (nn.Parameter(torch.randn(self.count, 2 * FF) / 2) for _ in range(2))

    def one(self, x, e):
        g, u = self.linear(x, "up", e).chunk(2, -1)
        return self.linear(F.silu(g + self.b_g[e, :FF]) * (u + self.b_u[e, FF:]), "down", e)


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


@impostor(None)
class SecondChoicesGoToOtherExperts(Loop):
    """Two sets of experts, one for each choice."""

    own = True

    def __init__(self):
        super().__init__()
        self.second = nn.ModuleList(Expert(self.kind, self.bias) for _ in range(self.count))

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for k, experts in enumerate((self.list, self.second)):
            for e in range(self.count):
                (token,) = torch.where(ids[:, k] == e)
                out = out.index_add(0, token, experts[e](x[token]) * w[token, k, None])
        return out


@impostor("scaled as its bias is added")
class ProjectionScaledAsItsBiasIsAdded(Loop):
    bias, order = True, "io"

    def linear(self, x, name, e):
        alpha = 2.0 if name == "down" else 1.0
        return torch.addmm(getattr(self, f"b_{name}")[e], x, getattr(self, f"w_{name}")[e], alpha=alpha)


@impostor(ANY)
class ProjectionWhoseBiasIsScaled(Loop):
    bias, order = True, "io"

    def linear(self, x, name, e):
        beta = 0.5 if name == "up" else 1.0
        return torch.addmm(getattr(self, f"b_{name}")[e], x, getattr(self, f"w_{name}")[e], beta=beta)


@impostor(ANY)
class WeighedInsideBeforeABias(WeighedInside):
    """The last bias is not weighed."""

    bias, kind = True, "gelu"


@impostor(ANY)
class WeighedBeforeTheActivation(WeighedInside):
    def weighed(self, x, e, w):
        return self.linear(self.activate(self.linear(x, "up", e) * w.to(x.dtype)), "down", e)
