"""Results that take the place of a residual, in parts or with other weights."""

import torch

from tests.moe_impostors.base import ANY, Loop, impostor


class Residual(Loop):
    """Top-1 with a condition; results take the place of the residual, in parts that an impostor changes."""

    top, router = 1, "top1"

    def experts(self, x, ids, w):
        out, some = self.before(x), w[:, 0] > 0.4
        for e in range(self.count):
            (token,) = torch.where((ids[:, 0] == e) & some)
            out[token] = self.put(x, token, self.expert(x[token], e) * w[token], e)
            out = self.after(out, x, e)
        return out

    def before(self, x):
        return x.clone()

    def put(self, x, token, y, e):
        return y

    def after(self, out, x, e):
        return out


@impostor(None)
class ResidualAddedLater(Residual):
    """The first expert has not replaced it, and may be a mixture of its own."""

    def before(self, x):
        return torch.zeros_like(x)

    def after(self, out, x, e):
        return out + x if e == 0 else out


@impostor(ANY)
class ResidualAddedTwice(Residual):
    def after(self, out, x, e):
        return out + x if e == 0 else out


@impostor(None)
class ResidualReplacedByZeros(Residual):
    """Where the result is not counted zeros replace the residual."""

    def put(self, x, token, y, e):
        return torch.where(x[token, :1] > 0, y, 0.0)


@impostor(ANY)
class ResidualReplacedByItself(Residual):
    def put(self, x, token, y, e):
        return y + x[token]


@impostor(ANY)
class ResidualKeptByAnExpert(Residual):
    """One expert adds, the others replace."""

    def put(self, x, token, y, e):
        return y + x[token] if e == 1 else y


@impostor(ANY)
class ResidualReplacedByBoth(Residual):
    """Of a token's two experts the last one counts, and the residual goes."""

    top, router = 2, "softmax_topk"

    def experts(self, x, ids, w):
        out = x.clone()
        for e in range(self.count):
            token, k = torch.where(ids == e)
            out[token] = self.expert(x[token], e) * w[token, k, None]
        return out


@impostor(None)
class ResidualOfOthersIsReplaced(Residual):
    """Results are put at other tokens than theirs."""

    def experts(self, x, ids, w):
        out = x.clone()
        for e in range(self.count):
            (token,) = torch.where(ids[:, 0] == e)
            (other,) = torch.where(ids[:, 0].roll(1) == e)
            out[other] = self.expert(x[token], e) * w[token]
        return out


@impostor(None)
class ResidualIsMasked(Residual):
    def after(self, out, x, e):
        return out.masked_fill(x[:, :1] > 0.5, 0.0) if e == 3 else out
