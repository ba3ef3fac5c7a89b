"""Near-misses of Mesh TensorFlow's top-2: places that two tokens share, tokens that are sent by another rule."""

import torch
import torch.nn.functional as F

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.base import B, H, S
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
