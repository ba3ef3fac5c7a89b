"""Gates that are not closed where they look so, or not without a gradient; rows of which every gate is closed."""

import torch
import torch.nn.functional as F

from tests.moe_impostors.base import impostor
from tests.moe_spellings.gates import Gated, below_the_kth


class Gates(Gated):
    own = True


@impostor("every expert gets every token")
class NeverZero(Gates):
    def gates(self, logits):
        return F.softplus(logits)


@impostor("every expert gets every token")
class ZeroWithAGradient(Gates):
    def gates(self, logits):
        return F.leaky_relu(logits, 0.0) + F.gelu(logits)


@impostor("every expert gets every token")
class OpenEverywhere(Gates):
    def gates(self, logits):
        return F.relu(logits) + 0.1


@impostor("every expert gets every token")
class ClampedAboveZero(Gates):
    def gates(self, logits):
        return logits.clamp(min=0.1)


@impostor("every expert gets every token")
class FilledWithWhatDoesNotHide(Gates):
    def gates(self, logits):
        return logits.masked_fill(below_the_kth(logits), -5.0).softmax(-1)


@impostor("every expert gets every token")
class GatesStraightThrough(Gates):
    """Zero, but with the sigmoid's gradient."""

    def gates(self, logits):
        return (logits > 0).to(logits.dtype) - logits.sigmoid().detach() + logits.sigmoid()


@impostor(None)
class WrittenAfterwards(Gates):
    def gates(self, logits):
        gates = logits.clamp(min=0)
        first, rest = gates[:, :2], gates[:, 1:]
        first.add_(0.1)
        rest.mul_(2.0)
        return torch.cat([gates[:, :1], rest], 1)


@impostor(None)
class OneIsAlwaysOpen(Gates):
    def gates(self, logits):
        gates = logits.clamp(min=0)
        gates[:, 1] = 1.0
        return gates


@impostor(None)
class NothingIsKept(Gates):
    """A softmax of nothing is NaN, a row as it is."""

    def gates(self, logits):
        return logits.masked_fill(logits < 0.8, -torch.inf).softmax(-1)

    def forward(self, x):
        y = super().forward(x)
        return y.nan_to_num(nan=7.0)


@impostor(None)
class ZeroByZero(NothingIsKept):
    def gates(self, logits):
        gates = F.relu(logits - 0.8)
        return gates / gates.sum(-1, keepdim=True)


@impostor(None)
class OnTheEdge(Gates):
    """Where it is zero exactly, a maximum has half of its gradient."""

    def gates(self, logits):
        rounded = logits.round().detach() + 0.5 * (logits - logits.detach())
        return torch.maximum(rounded, torch.zeros(()))


@impostor(None)
class TimesALearnedZero(Gates):
    """A factor of zero has a gradient where the gate is open."""

    def __init__(self):
        super().__init__()
        self.scales = torch.nn.Parameter(torch.tensor([0.0, 1.0, 0.0, 2.0]))

    def gates(self, logits):
        return F.relu(logits) * self.scales


@impostor("zeros do not give zeros")
class ClearedButForTheBias(Gates):
    bias = True

    def weighed(self, x, gates):
        kept = (gates > 0.2).to(x.dtype)
        return sum(self.expert(x * kept[:, [e]], e) * gates[:, [e]].sigmoid() for e in range(self.count))


@impostor(None)
class ClearedByOthers(Gates):
    def weighed(self, x, gates):
        kept = (gates > 0.2).to(x.dtype)
        return sum(self.expert(x * kept[:, [3 - e]], e) * gates[:, [e]] for e in range(self.count))
