"""What is written or read elsewhere in between, and experts left out or used twice."""

import torch

from tests.moe_impostors.base import ANY, Loop, Masked, impostor
from tests.moe_spellings.base import Block


@impostor(ANY, mode="infer")
class WeightWrittenInTheLoop(Loop):
    """The weights of experts 1 and 3 are written after expert 2 has run, and put back at the end."""

    def one(self, rows, e):
        y = self.expert(rows, e)
        if e == 2:
            self.w_down[3].mul_(2.0)
            self.w_down[1].mul_(4.0)
        if e == 3:
            self.w_down[3].mul_(0.5)
            self.w_down[1].mul_(0.25)
        return y


@impostor(ANY, mode="infer")
class StackWrittenInTheSum(Masked):
    """All experts' weights are doubled halfway, and halved at the end."""

    def one(self, x, e):
        if e == 2:
            self.w_up.mul_(2.0)
        y = self.expert(x, e)
        if e == 3:
            self.w_up.mul_(0.5)
        return y


@impostor(None)
class TokensWrittenInTheLoop(Block):
    """x is changed between the experts: later ones read other tokens."""

    def experts(self, x, ids, w):
        out, x = torch.zeros_like(x), x * 1
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token], e) * w[token, k, None])
            x.mul_(0.9)
        return out


@impostor(None)
class OutputReadInTheLoop(Block):
    """Each expert sees what the ones before it have written."""

    def experts(self, x, ids, w):
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out = out.index_add(0, token, self.expert(x[token] + out[token], e) * w[token, k, None])
        return out


@impostor(None)
class OutputUsedInTheMiddle(Block):
    def experts(self, x, ids, w):
        out, middle = torch.zeros_like(x), 0.0
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out = out.index_add(0, token, self.expert(x[token], e) * w[token, k, None])
            middle = out.square().mean() if e == 2 else middle
        return out + middle


@impostor(None)
class HiddenUsedElsewhere(Masked):
    """The hidden units' size is a penalty in the result."""

    def one(self, x, e):
        hidden = self.activate(self.linear(x, "up", e))
        return self.linear(hidden, "down", e) + hidden.square().mean()


@impostor(None)
class ExpertOutputUsedElsewhere(Masked):
    def experts(self, x, ids, w):
        ys = [self.expert(x, e) for e in range(self.count)]
        return sum(self.coefficient(w, ids, e) * y for e, y in enumerate(ys)) + ys[3].mean()


@impostor(None)
class MaskOfTheNextExpert(Loop):
    """Expert e on the tokens of e + 1: the last expert has none, and who chose 0 gets nothing."""

    def hits(self, ids, e):
        return torch.where(ids == e + 1)


@impostor(None)
class WeightsRotated(Loop):
    """The same, all the way round: a permutation of the experts."""

    def hits(self, ids, e):
        return torch.where(ids == (e + 1) % self.count)


@impostor(None)
class LastExpertSkipped(Loop):
    def order_of_experts(self):
        return range(self.count - 1)


@impostor(None)
class FirstExpertSkipped(Masked):
    def order_of_experts(self):
        return range(1, self.count)


@impostor(None)
class AnExpertAcrossTokens(Masked):
    """The others may be a mixture of their own, to which this one is added."""

    own = True

    def order_of_experts(self):
        return (0, 2, 3, 1)

    def one(self, x, e):
        return super().one(x, e).cumsum(0) if e == 1 else super().one(x, e)


@impostor(None)
class AnExpertAcrossTokensOfATable(AnExpertAcrossTokens):
    """The same, of ids that could be any."""

    def experts(self, x, ids, w):
        return super().experts(x, torch.tensor([2, 0, 3, 1])[ids], w)


@impostor(None)
class ExpertTwice(Loop):
    def order_of_experts(self):
        return (0, 1, 2, 3, 2)


@impostor(None)
class WeightsOfOneExpertTwice(Masked):
    """Expert 3 computes with the weights of expert 1."""

    def one(self, x, e):
        return self.expert(x, 1 if e == 3 else e)


@impostor(None)
class DownOfAnotherExpert(Masked):
    def one(self, x, e):
        return self.linear(self.activate(self.linear(x, "up", e)), "down", (e + 1) % self.count)


@impostor(None)
class UnderAutocast(Loop):
    """Products in bfloat16 of weights in float32, index_add_ in float32."""

    def experts(self, x, ids, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = torch.zeros_like(x)
            for e in range(self.count):
                token, k = torch.where(ids == e)
                y = self.expert(x[token], e) * w[token, k, None]
                out.index_add_(0, token, y.to(out.dtype))
        return out


@impostor(None)
class SumUnderAutocast(Masked):
    def experts(self, x, ids, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().experts(x, ids, w)


@impostor(None)
class WithoutGradients(Loop):
    """All of it without gradients, in a program that has some."""

    def experts(self, x, ids, w):
        with torch.no_grad():
            y = super().experts(x, ids, w)
        return x + y


@impostor(None)
class NarrowedInBetween(Masked):
    """The hidden units are rounded to bfloat16 in a float32 program."""

    def one(self, x, e):
        return self.linear(self.activate(self.linear(x, "up", e)).bfloat16().to(x.dtype), "down", e)


@impostor(None)
class SummedInHalf(Masked):
    """The sum is kept in bfloat16 in a float32 program."""

    def combine(self, out, c, y):
        return (out + (c * y)).bfloat16().to(y.dtype)


@impostor(None)
class WeightsViewedWithoutGradients(Loop):
    """A view that is made without gradients hands none on, though it only moves data."""

    def weight(self, w, token, k):
        with torch.no_grad():
            flat = w.reshape(-1)
        return flat[token * self.top + k]


@impostor(ANY, mode="infer")
class OwnWeightWrittenAfterItsUse(Loop):
    """The weight of expert 1, a tensor of its own, is written when expert 2 has run, and put back at the end."""

    own = True

    def one(self, rows, e):
        if e == 3:
            self.list[1].w_down.weight.mul_(4.0)
        return self.expert(rows, e)

    def experts(self, x, ids, w):
        out = super().experts(x, ids, w)
        self.list[1].w_down.weight.mul_(0.25)
        return out
