"""Near-misses of mixtures of experts, as changes of three forms: a loop, a masked sum, sorted tokens.

Each gives the refusal's reason (a pattern over its text; no site), NOTHING where there is no site and need be no
refusal, or None: "refused or right", where fusing is allowed as long as every number agrees with eager.
"""

from __future__ import annotations

import dataclasses

import torch

from tests.moe_spellings.base import B, Block, H, S, Spelling
from tests.moe_spellings.grouped import Grouped

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


def impostor(reason: str | None, mode: str = "train", shape: tuple[int, ...] = (B, S, H)):
    def register(block):
        name = block.__name__
        assert name not in IMPOSTORS, name
        IMPOSTORS[name] = Impostor(Spelling(name, block, shape, (), torch.float32, (mode,)), reason)
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
