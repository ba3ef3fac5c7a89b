"""What a launch's formulas read: captured tensors, sizes, and what is known of captures block by block.

    keep = kv <= q & pad[b, kv]   ->   captures pad, low pad [B,S_kv/N], high pad;   formulas KEEP, KINDS, ...

A captured mask or id that is read at plain positions gets two companions, its least and greatest value per block, from
which KINDS tells blocks that the data leave EMPTY, PARTIAL or FULL. They are made on the device by tensor operations,
so that layers that share a mask share them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
from torch import Tensor

from .. import bounds, expr as E
from ..derive import derivative
from ..tuning.attention import Config
from . import blocks
from .mint import mint, mint_gradients, mint_kinds
from .problem import Problem


def extent(x: Tensor) -> Any:
    """The largest offset of an element."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))


def is_wide(x: Tensor) -> bool:
    """Whether offsets may need 64 bits."""
    largest = extent(x)
    return not isinstance(largest, int) or largest >= 1 << 31


@dataclasses.dataclass(frozen=True)
class Data:
    """Captured tensors by name, and the sizes of the Spec, as kernels take them."""

    captures: dict[str, Tensor]
    sizes: dict[str, Any]

    @property
    def shape(self) -> tuple[tuple[str, int, bool], ...]:
        return tuple((name, x.dim(), is_wide(x)) for name, x in self.captures.items())

    @property
    def arguments(self) -> tuple[tuple, tuple, tuple]:
        pointers = tuple(self.captures.values())
        layout = tuple(n for x in self.captures.values() for n in (*x.shape, *x.stride()))
        return pointers, layout, tuple(self.sizes.values())


def same_of() -> Any:
    if triton.knobs.runtime.interpret:
        return blocks.same
    return blocks.same_in_wave if torch.version.hip else blocks.same_in_warp


def arguments(p: Problem, config: Config, buffers: dict[str, Tensor] | None = None) -> tuple[Data, dict[str, Any]]:
    """(the formulas' data, the formulas as jit functions) of a launch; buffers: captures' gradients."""
    spec, scope = p.spec, p.scope
    companions = Companions(p, config)
    kinds = bounds.ends(spec.keep, companions.interval, (*companions.points, *scope.sizes))
    kinds = kinds[0], E.and_(kinds[1], companions.visible())
    captures = {**scope.captures, **{f"d {name}": x for name, x in (buffers or {}).items()}, **companions.made}
    data = Data(captures, dict(scope.sizes))
    sizes = tuple(scope.sizes)
    formulas = {
        "SCALE": spec.scale,
        "SCORE": None if spec.score == E.S else mint(spec.score, data.shape, sizes, scored=True),
        "KEEP": None if spec.keep is E.TRUE else mint(spec.keep, data.shape, sizes),
        "KINDS": None if kinds == (E.TRUE, E.TRUE) else mint_kinds(*kinds, data.shape, sizes),
        "SAME": same_of(),
        "LIMIT": int((1.0 - spec.dropout) * 2**32) if spec.dropout else None,
        "GROW": 1.0 / (1.0 - spec.dropout),
    }
    if buffers is not None:
        slope = derivative(spec.score, E.S)
        formulas["SLOPE"] = None if slope == E.number(1.0) else mint(slope, data.shape, sizes, scored=True)
        formulas["GRADIENTS"] = mint_gradients(spec.score, tuple(buffers), data.shape, sizes) if buffers else None
    return data, formulas


VANISHING, COUNTING = -1e30, -1e20  # a score below the one is nothing beside one above the other


class Companions:
    """What is known of captures in a block.

    made    the tensors that say it, by name; points: positions of which a block has only one
    steps   of q and kv: (how many there are, how many a block has); places: where a block lies in a tensor of `made`
    """

    def __init__(self, p: Problem, config: Config):
        self.p = p
        self.made: dict[str, Tensor] = {}
        S_q, S_kv = p.q.shape[2], p.k.shape[2]
        one = config.packed and isinstance(S_q, int) and S_q == 1
        self.points = ("b", "q") if one else ("b",) if config.packed else ("b", "h")
        # A packed program sees every q.
        self.steps = {"q": (S_q, S_q if config.packed else config.BLOCK_M), "kv": (S_kv, config.BLOCK_N)}
        self.places = {
            "q": E.number(0) if config.packed else E.floordiv(E.index("q_low"), E.number(config.BLOCK_M)),
            "kv": E.floordiv(E.index("kv_low"), E.number(config.BLOCK_N)),
        } | {axis: E.index(axis) for axis in self.points}

    def interval(self, load: E.Expr) -> tuple[E.Expr, E.Expr] | None:
        """The least and greatest value of a captured integer or boolean in a block, as formulas."""
        name, *indices = E.operands(load)
        if all({x.name for x in i.free_symbols} <= {*self.points, *self.p.scope.sizes} for i in indices):
            return load, load
        axes = self._axes(load)
        if axes is None or E.kind(load) == "float":
            return None
        low, high = extremes(self.p.scope.captures[name.name], self._cut(axes))
        return self._load("low", load, axes, low), self._load("high", load, axes, high)

    def visible(self) -> E.Expr:
        """False of a block only where an additive mask, -inf or a number that vanishes, hides all of it."""
        found = E.TRUE
        for load in _added(self.p.spec.score):
            axes, capture = self._axes(load), self.p.scope.captures[E.operands(load)[0].name]
            if axes is None or "kv" not in axes:
                continue
            most = self._load("most", load, axes, extremes(capture, self._cut(axes))[1])
            hidden = E.compare_float("le", most, E.number(-math.inf))
            if self.p.spec.keep is E.TRUE and self.p.spec.sink is None:
                # Beside a score that counts, one below VANISHING weighs exactly 0: every row must have one.
                d = axes.index("kv")
                rows, left = capture.narrow(d, 0, self.steps["kv"][0]).amax(d), [a for a in axes if a != "kv"]
                least = self._load("least", load, left, extremes(rows, self._cut(left))[0])
                counts = E.compare_float("le", E.number(COUNTING), least)
                hidden = E.or_(hidden, E.and_(counts, E.compare_float("le", most, E.number(VANISHING))))
            found = E.and_(found, E.not_(hidden))
        return found

    def _axes(self, load: E.Expr) -> list[str] | None:
        """The positions that a load reads, if they are plain, different and inside."""
        name, *indices = E.operands(load)
        axes = [getattr(i, "name", "") for i in indices]
        if len(set(axes)) < len(axes) or not {*axes} <= {*self.places}:
            return None
        capture = self.p.scope.captures[name.name]
        inside = (_reaches(capture.shape[d], self.steps[a][0]) for d, a in enumerate(axes) if a in self.steps)
        return axes if all(inside) else None

    def _cut(self, axes: list[str]) -> dict[int, tuple[Any, Any]]:
        return {d: self.steps[a] for d, a in enumerate(axes) if a in self.steps and a not in self.points}

    def _load(self, end: str, load: E.Expr, axes: list[str], x: Tensor) -> E.Expr:
        name = f"{end} {E.operands(load)[0].name} {' '.join(axes)}"
        self.made[name] = x
        return E.load(name, E.kind(load), *(self.places[a] for a in axes))


def _added(score: E.Expr) -> list[E.Expr]:
    """Captured floats that are added to the whole score: s + mask[b, q, kv]."""
    if E.op_of(score) != "add":
        return []
    parts = E.operands(score)
    loads = [x for x in parts if E.op_of(x) == "load" and E.kind(x) == "float"]
    return loads + [y for x in parts for y in _added(x)]


def _reaches(size: Any, S: Any) -> bool:
    return size >= S if isinstance(size, int) and isinstance(S, int) else str(size) == str(S)


def extremes(x: Tensor, cut: dict[int, tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """(least, greatest) values of x over blocks; cut: dim -> (how much of it counts, size of a block)."""
    x = x.to(torch.uint8) if x.dtype == torch.bool else x
    inner: list[int] = []
    for d, (size, step) in sorted(cut.items()):
        d += len(inner)
        x = x.narrow(d, 0, size)
        if not isinstance(size, int) or size % step:
            # The last block repeats the last value.
            at = torch.arange((size + step - 1) // step * step, device=x.device)
            x = x.index_select(d, at.clamp_max(size - 1))
        x = x.unflatten(d, (-1, step))
        inner.append(d + 1)
    return (x.amin(inner), x.amax(inner)) if inner else (x, x)
