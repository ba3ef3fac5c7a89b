"""No ids: an expert gets the tokens for which a condition of its own holds, so a token may have any number of them."""

import torch

from tests.moe_spellings.base import Block, moe


class Gates(Block):
    """gates [T,E], of which those count that `kept` says."""

    def gates(self, x):
        return self.gate(x).sigmoid()

    def kept(self, gates):
        return gates > 0.5

    def coefficients(self, x):
        gates = self.gates(x)
        return torch.where(self.kept(gates), gates, 0.0)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        return self.weighed(flat, self.gates(flat)).view(x.shape)


@moe(own=True, bias=True)
@moe(kind="gelu", order="oi")
class AboveHalf(Gates):
    def weighed(self, x, gates):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token = self.kept(gates)[:, e].nonzero().squeeze(-1)
            out.index_add_(0, token, self.expert(x[token], e) * gates[token, e, None])
        return out


@moe(own=True, kind="relu")
class NotBelowTheKth(Gates):
    """Ties have all of theirs."""

    def gates(self, x):
        return self.gate(x).softmax(-1)

    def kept(self, gates):
        return gates >= gates.topk(self.top, dim=-1).values[:, -1:]

    def weighed(self, x, gates):
        gates = gates * self.kept(gates)
        return sum(gates[:, e : e + 1] * self.expert(x, e) for e in range(self.count))


@moe()
@moe(kind="gelu", bias=True)
class OfAllExpertsAtOnce(Gates):
    def weighed(self, x, gates):
        y = self.mlp(x.expand(self.count, *x.shape), lambda x, W, b: x @ W if b is None else x @ W + b[:, None])
        return torch.einsum("te,eth->th", gates.masked_fill(~self.kept(gates), 0.0), y)


@moe(own=True, kind="gelu")
class AmongItsFirst(Gates):
    """As many tokens as an expert takes."""

    def kept(self, gates):
        above = gates > 0.4
        return above & (above.cumsum(0) <= 5)

    def weighed(self, x, gates):
        out, kept = torch.zeros_like(x), self.kept(gates)
        for e in range(self.count):
            (token,) = torch.where(kept[:, e])
            out[token] += self.expert(x[token], e) * gates[token, e].unsqueeze(-1)
        return out


@moe(own=True)
class TwoKindsOfTokens(Block):
    """One of two experts, as of images and of texts, is put where a flag says so."""

    count = 2

    def flags(self, x):
        return self.gate(x)[:, 0] > 0

    def coefficients(self, x):
        return torch.stack([self.flags(x), ~self.flags(x)], 1).to(x.dtype)

    def experts(self, x, ids, w):
        out, flags = torch.empty_like(x), self.flags(x)
        out[flags] = self.expert(x[flags], 0)
        out[~flags] = self.expert(x[~flags], 1)
        return out


@moe(own=True, kind="gelu", bias=True)
class OneOfThree(Block):
    """Conditions inside of conditions."""

    count = 3

    def coefficients(self, x):
        first, second = (self.gate(x)[:, :2] > 0).unbind(1)
        return torch.stack([first, ~first & second, ~first & ~second], 1).to(x.dtype)

    def experts(self, x, ids, w):
        first, second = (self.gate(x)[:, :2] > 0).split(1, 1)
        y = [self.expert(x, e) for e in range(3)]
        return torch.where(first, y[0], torch.where(second, y[1], y[2]))
