"""One call of tv::moe: the tensors, the Spec, the record that a MoE kernel is, and the formula in plain PyTorch.

    T tokens   K experts per token   E experts   H features of x   F of an expert   H_out of the result   P = spec.parts

    x [T,H]   ids [T,K], integers: an expert in [0, E), or -1 for a pair that was dropped   weights [T,K]
    up         [E,H,P*F], or two of [E,H,F] in layout "separate"; lists: E (gates, then ups: 2E) of two dims
    down       [E,F,H_out], or E of two dims
    up_bias    none, or like `up` without H;   down_bias none, or like `down` without F
    hidden     [T*K,P*F]: what the experts activate (biases added), in x's dtype, row r that of pair order[r]; g's
               columns first in layout "separate", else as in `up`
    Strides are any: `up` may be a transposed view of [E,N,H] in memory.

The pairs (t, k), numbered t*K + k, are sorted by expert, equal experts by number (`Routing`); dropped ones come last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..arch import Device
from ..expr import Expr
from ..moe_spec import MoESpec
from ..tuning.cpu import ExpertConfig
from ..tuning.work import Experts as Work, dtype_name
from . import mods


@dataclasses.dataclass(frozen=True)
class Units:
    """What the names of an activation's formula stand for."""

    u: Tensor
    g: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.u.dtype

    @property
    def device(self) -> torch.device:
        return self.u.device

    @property
    def parts(self) -> list[Tensor]:
        """[u, g] or [u]"""
        return [self.u] if self.g is None else [self.u, self.g]

    def value(self, name: str) -> Tensor | None:
        return getattr(self, name)


@dataclasses.dataclass(frozen=True)
class Experts:
    """The arguments of tv::moe; shapes above. For the CPU kernel: how it cuts them, and whether it may compile."""

    spec: MoESpec
    x: Tensor
    ids: Tensor
    weights: Tensor
    up: Sequence[Tensor]
    down: Sequence[Tensor]
    up_bias: Sequence[Tensor]
    down_bias: Sequence[Tensor]
    config: ExpertConfig = ExpertConfig()
    compiled: bool = False

    @staticmethod
    def of(x, ids, weights, up, down, up_bias, down_bias, spec: str) -> Experts:
        return Experts(MoESpec.parse(spec), x, ids, weights, up, down, up_bias, down_bias)

    @property
    def stacked(self) -> bool:
        return self.down[0].dim() == 3

    @property
    def count(self) -> int:
        """E"""
        return int(self.down[0].shape[0]) if self.stacked else len(self.down)

    @property
    def features(self) -> tuple[int, int, int]:
        """(H, F, H_out), numbers always: kernels are compiled for them."""
        F, H_out = self.down[0].shape[-2:]
        return int(self.x.shape[1]), int(F), int(H_out)

    @property
    def out_dtype(self) -> torch.dtype:
        return getattr(torch, self.spec.out) if self.spec.out else self.x.dtype

    def of_expert(self, tensors: Sequence[Tensor], e: int) -> list[Tensor]:
        """The parts that belong to expert e: one tensor, or in layout "separate" gate and up; [] without a bias."""
        if self.stacked:
            return [t[e] for t in tensors]
        return list(tensors[e :: self.count])

    def split(self, pre: Tensor) -> Units:
        """g and u of pre-activations [..., P*F] as `hidden` holds them."""
        if self.spec.layout == "plain":
            return Units(pre)
        if self.spec.layout == "interleave":
            return Units(g=pre[..., 0::2], u=pre[..., 1::2])
        g, u = pre.chunk(2, -1)
        return Units(u, g)


def activate(e: Expr, units: Units) -> Tensor:
    """A formula of g and u; what does not mention them broadcasts."""
    value = mods.evaluate(e, units)
    return value if isinstance(value, Tensor) else torch.full_like(units.u, value)


@dataclasses.dataclass(frozen=True)
class Routing:
    """order [T*K]: pair numbers sorted by expert; offsets [E+1]: expert e's rows are offsets[e] up to offsets[e+1].

    ids [[1, 0], [2, 1]], E = 3  ->  order [1, 0, 3, 2], offsets [0, 1, 3, 4]
    """

    order: Tensor
    offsets: Tensor

    @staticmethod
    def of(ids: Tensor, count: int) -> Routing:
        flat = ids.reshape(-1)
        keys = torch.where(flat < 0, count, flat)  # as those beyond, sorted behind all experts
        # By search and not bincount: on a GPU that reads the greatest id back to the host.
        found, order = torch.sort(keys, stable=True)
        return Routing(order, torch.searchsorted(found, torch.arange(count + 1, device=ids.device, dtype=found.dtype)))


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which gradients backward is asked for."""

    x: bool = True
    weights: bool = True
    projections: bool = True
    biases: bool = True


@dataclasses.dataclass(frozen=True)
class ExpertGradients:
    """Like the arguments; zeros of size 0 where not wanted."""

    x: Tensor
    weights: Tensor
    up: list[Tensor]
    down: list[Tensor]
    up_bias: list[Tensor]
    down_bias: list[Tensor]


@dataclasses.dataclass(frozen=True)
class ExpertNeed:
    """What a kernel is asked: spec, dtype of x and the weights, sizes (0 where not known), device, backward or not."""

    spec: MoESpec
    dtype: torch.dtype
    backward: bool = False
    tokens: int = 0
    top: int = 0
    experts: int = 0
    features: tuple[int, int, int] = (0, 0, 0)
    stacked: bool = True
    device: Device = Device("cpu")

    @property
    def work(self) -> Work:
        """What tuning knows of it."""
        sizes = self.tokens, self.top, self.experts, *self.features
        return Work(self.spec, dtype_name(self.dtype), *sizes, self.stacked)


@dataclasses.dataclass(frozen=True)
class ExpertKernel:
    """name, device, and

    supports  need -> None or the reason why it does not serve
    forward   experts, save -> (out [T,H_out], hidden or an empty tensor where not `save`)
    backward  experts, grad_out, hidden (or empty: it is computed again), wanted -> ExpertGradients
    """

    name: str
    device: str
    supports: Callable[[ExpertNeed], str | None]
    forward: Callable[[Experts, bool], tuple[Tensor, Tensor]]
    backward: Callable[[Experts, Tensor, Tensor, Wanted], ExpertGradients]


def moe_ref(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_bias: Sequence[Tensor] = (),
    down_bias: Sequence[Tensor] = (),
    spec: str = "act = u",
) -> Tensor:
    """The result by the formula: every expert on every token. Differentiable by autograd; give it float64."""
    p = Experts.of(x, ids, weights, up, down, up_bias, down_bias, spec)
    out = torch.zeros(x.shape[0], p.features[2], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for e in range(p.count):
        for k in range(ids.shape[1]):
            chosen, w = (ids[:, k] == e)[:, None], weights[:, k, None]
            rows = x * w if p.spec.weigh == "input" else x
            pre = torch.cat([rows @ W for W in p.of_expert(p.up, e)], -1)
            if p.up_bias:
                pre = pre + torch.cat(p.of_expert(p.up_bias, e), -1)
            y = activate(p.spec.act, p.split(pre)) @ p.of_expert(p.down, e)[0]
            if p.down_bias:
                y = y + p.of_expert(p.down_bias, e)[0]
            y = y if p.spec.weigh == "input" else y * w
            out = out + torch.where(chosen, y, 0.0)
    return out.to(p.out_dtype)
