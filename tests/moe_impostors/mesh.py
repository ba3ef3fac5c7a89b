"""Near-misses of Mesh TensorFlow's top-2: places that two tokens share, tokens that are sent by another rule."""

import torch
import torch.nn.functional as F

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.base import B, Block, H, S
from tests.moe_spellings.mesh import MeshTopTwo

SHAPE = (B, S, H)


class Mesh(MeshTopTwo):
    three, kind = True, "gelu"


@impostor(ANY, shape=SHAPE)
class ZeroBehind(Mesh):
    """The running sum is read one place later: the place of a token counts the token itself."""

    def before(self, mask):
        return F.pad(mask, (0, 0, 0, 1)).cumsum(dim=-2)[..., 1:, :]


@impostor(ANY, shape=SHAPE)
class TwoZerosBefore(Mesh):
    """Two neighbours may share a place."""

    def before(self, mask):
        return F.pad(mask, (0, 0, 2, 0)).cumsum(dim=-2)[..., :-2, :]


@impostor(None, shape=SHAPE)
class OneBefore(Mesh):
    """Not a zero but a one: places begin at 1."""

    def before(self, mask):
        return F.pad(mask, (0, 0, 1, 0), value=1.0).cumsum(dim=-2)[..., :-1, :]


@impostor(ANY, shape=SHAPE)
class CountedAcrossSequences(Mesh):
    def before(self, mask):
        return mask.cumsum(dim=0) - mask


@impostor(ANY, shape=SHAPE)
class CountedWithoutTheFirst(Mesh):
    """Second choices may begin where the last first choice is."""

    def before(self, mask):
        return mask.cumsum(dim=-2) - mask

    def taken(self, mask):
        return mask[..., 1:, :].sum(dim=-2, keepdim=True)


@impostor(ANY, shape=SHAPE)
class SecondMayBeNegative(Mesh):
    def without(self, raw, first):
        return raw - 0.3 * torch.ones_like(raw) - first.to(raw.dtype)

    def sent(self, combine):
        return (combine > 0).to(combine)


@impostor(ANY, shape=SHAPE)
class SentAboveAWeight(Mesh):
    def sent(self, combine):
        return (combine > 0.3).to(combine)


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
