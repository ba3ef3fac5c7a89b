"""What backward computes for every activation of an expert, by Inductor: in one pass over memory.

Operation by operation it takes eight times as long, and 15 of 240 ms of a training step. How many of a batch's rows
there are only the ids tell, so it is no part of the graph: it is compiled the first time that a compiled graph runs it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import sympy
import torch
from torch import Tensor

from .. import expr as E
from ..derive import derivative
from ..expr import Expr
from ..moe_spec import MoESpec
from ..standalone import compiled
from . import mods
from .experts import Units

LARGE = 1 << 18  # activations; fewer are not worth the seconds that compiling takes
Step = Callable[..., tuple[Tensor, ...]]


def through_activation(spec: MoESpec, D: Tensor, w: Tensor, u: Tensor, g: Tensor | None = None) -> tuple[Tensor, ...]:
    """(the activations [n,F], weighted as the results are, <D, act> [n], du [n,F], dg [n,F] if gated).

    Of D [n,F], the weights w [n,1], u and g [n,F]; with weigh=input nothing is weighted. Computed in w's dtype.
    """
    units = Units(u.to(w.dtype), None if g is None else g.to(w.dtype))
    values = mods.evaluate(_slopes(spec.act, g is not None), units)
    act, *slopes = (v if isinstance(v, Tensor) else torch.full_like(units.u, v) for v in values)
    d = D.to(w.dtype)
    dw = (d * act).sum(-1)
    if spec.weigh == "output":
        d, act = d * w, act * w
    return act.to(D.dtype), dw, *((d * slope).to(D.dtype) for slope in slopes)


@functools.lru_cache(maxsize=256)
def _slopes(act: Expr, gated: bool) -> Expr:
    """(act, d act / d u, d act / d g) as one formula, so that they share what they have in common."""
    return sympy.Tuple(act, derivative(act, E.UP), *([derivative(act, E.GATE)] * gated))


def step_of(spec: MoESpec, dtype: torch.dtype, compute: torch.dtype, fused: bool) -> Step:
    """`through_activation` for any number of rows and features; `fused`: compiled, if it can be."""
    return fused and _compiled(spec, dtype, compute) or functools.partial(through_activation, spec)


@functools.lru_cache(maxsize=256)
def _compiled(spec: MoESpec, dtype: torch.dtype, compute: torch.dtype) -> Step | None:
    n, F = 130, 48
    example = [torch.zeros(n, F, dtype=dtype), torch.zeros(n, 1, dtype=compute)]
    example += torch.zeros(n, spec.parts * F, dtype=dtype).chunk(spec.parts, 1)
    try:
        return compiled(functools.partial(through_activation, spec), example)
    except Exception as error:
        warnings.warn(
            f"tvcompile: Inductor could not compile the activation of `{spec}`, which runs operation by operation: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return None
