"""Tokens that are cleared before an expert by a mask that is not of its own tokens, and masks of other choices."""

import torch

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.base import Block


class Cleared(Block):
    """Tokens are cleared before an expert by a mask that is not of its own tokens."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            pairs = ids == e
            out = out + self.expert(self.cleared(x, ids, e), e) * (w * pairs).sum(-1, keepdim=True)
        return out


@impostor(ANY)
class ItsOwnCleared(Cleared):
    def cleared(self, x, ids, e):
        return x.masked_fill((ids == e).any(-1, keepdim=True), 0.0)


@impostor(ANY)
class AnotherExpertsKept(Cleared):
    def cleared(self, x, ids, e):
        return torch.where((ids == (e + 1) % self.count).any(-1, keepdim=True), x, 0.0)


@impostor(ANY)
class FirstChoicesKept(Cleared):
    def cleared(self, x, ids, e):
        return x * (ids[:, :1] == e)


@impostor(None)
class OnesElsewhere(Cleared):
    """What tokens of others become does not count, but may be refused."""

    def cleared(self, x, ids, e):
        return torch.where((ids == e).any(-1, keepdim=True), x, torch.ones_like(x))


@impostor("depends on what it computes")
class ClearedByItsOwnSum(Block):
    """Whether a token counts only the expert's hidden features tell."""

    kind = "gelu"

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            hidden = self.activate(self.linear(x, "up", e))
            hidden = torch.where(hidden.sum(-1, keepdim=True) > 0, hidden, 0.0)
            out = out + self.linear(hidden, "down", e) * (w * (ids == e)).sum(-1, keepdim=True)
        return out


@impostor(None)
class RoundedNumbers(Block):
    """Weights are whole numbers that bfloat16 rounds."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            out = out + self.expert(x, e) * ((ids == e) * (ids * 100 + 257)).sum(-1, keepdim=True).bfloat16()
        return out


@impostor(None)
class TwoNamesOfThree(Block):
    """Third choices are not asked for."""

    top = 3

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            mine = (ids[:, 0] == e) | (ids[:, 1] == e)
            out[mine] += self.expert(x[mine], e) * (w * (ids == e)).sum(-1, keepdim=True)[mine]
        return out


@impostor(None)
class TwoOfFirstChoices(Block):
    """An expert gets the tokens whose first choice is it or the next one; the last has its own alone."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            mine = (ids[:, 0] == e) | (ids[:, 0] == e + 1)
            out[mine] += self.expert(x[mine], e) * w[mine][:, :1]
        return out
