"""A score formula taken apart: scale, keep predicate, score edit, and what a fully masked row means.

    where(kv <= q, dot*0.125, -inf)              scale=0.125; keep = kv <= q;  filled by -inf
    dot/8.0 + where(pad[b, kv], 0.0, -3.4e38)    scale=0.125; keep = pad[b, kv];  -3.4e38 added

Only what commutes with the masking is moved past it; what does not stays in the score formula, where
it is evaluated as written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import sympy
import torch

from .. import expr as E
from ..expr import Expr
from ..spec import Refuse

SHARED = "a maximum shares the gradient where both sides are the fill"
REPLACED = "a fill took the place of a captured bias"
ADDED = "a term is added after the mask"
HUGE = 1e30  # beside a fill as large as finfo.min every other term vanishes
VANISH = {torch.float16: 6.0e4, torch.bfloat16: 5.4e8, torch.float32: 5.4e8, torch.float64: 2.9e17}
REPLACE = 1.0e7


@dataclasses.dataclass(frozen=True)
class Fill:
    """One masking: `value` took the place of the score (`cut`) or was added to it."""

    value: float
    cut: bool


@dataclasses.dataclass(frozen=True)
class Masked:
    """`value` where `keep`, some fill elsewhere; `fills` from the inside out.

    caveat: why fully masked rows get other gradients than the fills say, or ""
    """

    value: Expr
    keep: Expr = E.TRUE
    fills: tuple[Fill, ...] = ()
    caveat: str = ""

    def edit(self, value: Expr, **changes) -> Masked:
        return dataclasses.replace(self, value=value, **changes)


def _replaced(dtype: torch.dtype) -> float:
    return min(REPLACE, VANISH.get(dtype, math.inf))


def hides(fill: float | None, dtype: torch.dtype) -> bool:
    """Has what is filled with this number no weight in a softmax, beside any score that is none of such?"""
    return fill is not None and fill <= -_replaced(dtype)


class Masks:
    """Takes masks off a formula whose scores live in `dtype`."""

    def __init__(self, dtype: torch.dtype):
        self.added = VANISH[dtype]
        self.replaced = _replaced(dtype)

    def is_fill(self, e: Expr, cut: bool) -> bool:
        value = E.constant(e)
        return value is not None and not math.isnan(value) and value <= -(self.replaced if cut else self.added)

    def split(self, e: Expr) -> Masked:
        """The masks of a formula that holds the score."""
        op, args = E.op_of(e), E.operands(e)
        if op == "where":
            return self._choice(e, *args)
        if op in ("add", "sub") and _has_score(args[0]):
            return self._sum(op, *args)
        if op in ("mul", "div") and _has_score(args[0]) and not _has_score(args[1]):
            return self._scaled(op, e, *args)
        if op in ("max", "clamp_min") and self.is_fill(args[1], cut=True):
            inner = self.split(args[0])
            return inner.edit(inner.value, caveat=inner.caveat or (SHARED if op == "max" else ""))
        return Masked(e)

    def _choice(self, e: Expr, c: Expr, x: Expr, y: Expr) -> Masked:
        if self.is_fill(x, cut=True) and _has_score(y):
            c, x, y = E.not_(c), y, x
        if not (self.is_fill(y, cut=True) and _has_score(x)) or _has_score(c):
            return Masked(e)
        inner = self.split(x)
        fill = Fill(float(E.constant(y)), cut=True)
        return inner.edit(inner.value, keep=E.and_(c, inner.keep), fills=(*inner.fills, fill), caveat="")

    def _sum(self, op: str, x: Expr, y: Expr) -> Masked:
        if _has_score(y):
            return Masked(E.apply(op, x, y))
        inner, mask = self.split(x), self.additive(y) if op == "add" else Masked(y)
        return inner.edit(
            E.apply(op, inner.value, mask.value),
            keep=E.and_(inner.keep, mask.keep),
            fills=inner.fills + mask.fills,
            caveat=inner.caveat or (ADDED if inner.fills and E.constant(mask.value) != 0 else mask.caveat),
        )

    def additive(self, e: Expr) -> Masked:
        """The masks of a term that is added to the score: where(c, bias, fill)."""
        op, args = E.op_of(e), E.operands(e)
        if E.constant(e) == -math.inf:
            raise Refuse("nothing may attend")
        if op == "where":
            c, x, y = args
            if self.is_fill(x, cut=False):
                c, x, y = E.not_(c), y, x
            if self.is_fill(y, cut=False):
                inner = self.additive(x)
                fill = Fill(float(E.constant(y)), cut=False)
                caveat = REPLACED if any(E.kind(e) == "float" for e in E.loads(inner.value)) else inner.caveat
                return Masked(inner.value, E.and_(c, inner.keep), (*inner.fills, fill), caveat)
        if op == "add":
            x, y = (self.additive(a) for a in args)
            caveat = x.caveat or y.caveat
            return Masked(E.apply("add", x.value, y.value), E.and_(x.keep, y.keep), x.fills + y.fills, caveat)
        return Masked(e)

    def _scaled(self, op: str, e: Expr, x: Expr, c: Expr) -> Masked:
        inner = self.split(x)
        if inner.keep is E.TRUE:
            return Masked(e)
        factor = E.constant(c)
        if factor is None:
            raise Refuse("the score is scaled after a mask by a factor whose sign is unknown")
        if not factor > 0:
            raise Refuse("the score is scaled by a factor that is not positive after a mask")
        factor = factor if op == "mul" else 1 / factor
        fills = tuple(Fill(f.value * factor, f.cut) for f in inner.fills)
        if any(-f.value < (self.replaced if f.cut else self.added) for f in fills):
            return Masked(e)
        return inner.edit(E.apply(op, inner.value, c), fills=fills)


def _has_score(e: Expr) -> bool:
    return E.mentions(e, E.S)


def empty_meaning(parts: Masked, training: bool, dtype: torch.dtype = torch.float32) -> str | None:
    """The `empty` kind of rows in which every pair is masked; None where only the formula as written says it.

    Raises Refuse where an infinite and a finite masking meet: then a row's meaning is neither's.
    """
    fills, cuts = parts.fills, {f.cut for f in parts.fills}
    if all(math.isinf(f.value) for f in fills):
        if training and (len(cuts) > 1 or parts.caveat):
            return None  # an added -inf passes gradients, a filled one does not; what is added later gets them
        return "nan_cut" if cuts == {True} else "nan"
    if any(math.isinf(f.value) for f in fills):
        raise Refuse("two maskings that do not commute: -inf and a finite fill, and a row may be fully masked")
    twice = len({f.value for f in fills}) > 1 or any(not f.cut for f in fills[1:])
    small = any(-f.value < HUGE for f in fills)
    if twice or (parts.caveat == ADDED and small) or (training and (parts.caveat or len(cuts) > 1)):
        # The formula as written is evaluated in float32, where a fill must do what it does in the program.
        if small and (dtype.itemsize < 4 or any(-f.value < VANISH[torch.float32] for f in fills)):
            raise Refuse("what a fully masked row means depends on the rounding of two maskings that do not commute")
        return None
    return "mean" if cuts == {False} else "mean_cut"


POSITIONS = 1e5  # beyond which no difference of positions goes


def depth(e: Expr, learned: Callable[[Expr], bool]) -> float:
    """How far from 0 what is added to the score may be: the score itself counts as 0, weights that are learned as 1.

    A captured float may be a mask of its own, unless it is a slope, a factor of positions.
    """
    op, args = E.op_of(e), E.operands(e)
    if (value := E.constant(e)) is not None:
        return abs(value)
    if e is E.S or op in ("tanh", "sigmoid", "erf", "sin", "cos"):
        return 0.0 if e is E.S else 1.0
    if E.kind(e) == "int":
        return 1.0 if E.loads(e) else POSITIONS
    if op == "load":
        return 1.0 if learned(e) else math.inf
    below = [depth(x, learned) for x in args if E.kind(x) != "bool"]
    if op == "mul":
        if math.inf in below and any(_slope(*pair) for pair in (args, args[::-1])):
            return POSITIONS
        return 0.0 if 0.0 in below else math.prod(below)
    if op == "div" and (divisor := E.constant(args[1])):
        return below[0] / abs(divisor)
    if op in ("add", "sub"):
        return sum(below)
    return max(below) if op in ("where", "neg", "abs", "relu", "min", "max", "clamp_max", *E.CASTS) else math.inf


def _slope(x: Expr, positions: Expr) -> bool:
    while E.op_of(positions) in ("abs", "neg", *E.CASTS):
        (positions,) = E.operands(positions)
    moving = E.kind(positions) == "int" and not E.loads(positions)
    return moving and E.op_of(x) == "load" and not E.mentions(x, E.Q, E.KV)


def split_scale(e: Expr) -> tuple[float, Expr]:
    """(a, f) with e == f where the score s of f is a * (the score of e). Softcaps read tanh(s/c)*c."""
    factor, f = _pull(e)
    for x in E.walk(f):
        if E.op_of(x) == "mul" and E.op_of(E.operands(x)[0]) == "tanh":
            cap, inner = E.constant(E.operands(x)[1]), E.operands(E.operands(x)[0])[0]
            if cap is None or not cap > 0 or not _has_score(inner):
                continue
            grown = _times(inner, cap)
            if grown is not None:
                capped = E.apply("mul", E.apply("tanh", E.apply("div", grown, E.number(cap))), E.number(cap))
                return factor * cap, E.substitute(f, {x: capped})
    return factor, f


def _times(e: Expr, c: float) -> Expr | None:
    """c * e, with s counted as already multiplied; None where e is not s plus other terms."""
    if e is E.S:
        return e
    if E.op_of(e) in ("add", "sub"):
        x, y = E.operands(e)
        left = _times(x, c)
        if left is None or _has_score(y):
            return None
        divided = E.op_of(y) == "div" and E.constant(E.operands(y)[1]) == c
        return E.apply(E.op_of(e), left, E.operands(y)[0] if divided else E.apply("mul", y, E.number(c)))
    return None


def _pull(e: Expr) -> tuple[float, Expr]:
    """Move constant factors next to the score into one number."""
    if e is E.S or not _has_score(e):
        return 1.0, e
    op, args = E.op_of(e), E.operands(e)
    scored = [i for i, a in enumerate(args) if _has_score(a)]
    if op is None or len(scored) != 1 or isinstance(e, sympy.logic.boolalg.Boolean):
        return 1.0, e
    if op == "neg":
        return _pull(E.apply("mul", args[0], E.number(-1.0)))
    if op in ("mul", "div") and scored == [0] and (c := E.constant(args[1])) is not None and c != 0:
        inner_op, inner = E.op_of(args[0]), E.operands(args[0])
        if inner_op in ("add", "sub") and _has_score(inner[0]) and not _has_score(inner[1]):
            return _pull(E.apply(inner_op, *(E.apply(op, x, args[1]) for x in inner)))
        factor, f = _pull(args[0])
        if f is E.S:
            return factor * (c if op == "mul" else 1 / c), f
        return factor, E.apply(op, f, args[1])
    if op in E.CASTS:
        return _pull(args[0])
    (i,) = scored
    factor, f = _pull(args[i])
    return factor, E.apply(op, *(f if j == i else a for j, a in enumerate(args))) if op != "where" else E.where(
        *(f if j == i else a for j, a in enumerate(args))
    )
