"""Which (q block, kv block) pairs a keep formula leaves EMPTY, PARTIAL or FULL, by interval arithmetic.

    kinds(keep, {"q": blocks(S_q, M, 1), "kv": blocks(S_kv, N, 0), "b": (0, B-1), ...})   [S_q/M, S_kv/N]

Every formula gets the interval [low, high] of its values over a block, for all blocks at once (float64
arrays that broadcast, infinite where unknown; booleans are 0 and 1):

    kv - q        [kv_low - q_high, kv_high - q_low]
    kv <= q       low 1 (FULL) if kv_high <= q_low, high 0 (EMPTY) if kv_low > q_high

Sound, not complete: what cannot be decided is PARTIAL, never more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import sympy

from . import expr as E
from .expr import Expr

EMPTY, PARTIAL, FULL = 0, 1, 2
Interval = tuple[Any, Any]
UNKNOWN: Interval = (-np.inf, np.inf)
UNDECIDED: Interval = (0.0, 1.0)
EXACT = float(1 << 50)  # beyond it float64 is no safe home for an integer


def blocks(size: int, step: int, axis: int) -> Interval:
    """First and last position of each block of `step`, along dim -1 (axis 0) or -2 (axis 1)."""
    low: np.ndarray = np.arange(0, size, step, dtype=np.float64)
    high = np.minimum(low + step, size) - 1
    return (low[:, None], high[:, None]) if axis else (low, high)


def kinds(keep: Expr, table: Mapping[Any, Interval]) -> np.ndarray:
    """EMPTY, PARTIAL or FULL for every block; `table`: intervals of names and of captured loads."""
    low, high = interval(keep, table)
    return np.asarray(low + high, dtype=np.int8)


def interval(e: Expr, table: Mapping[Any, Interval]) -> Interval:
    """The values `e` may take. Names and loads missing from the table are unknown."""
    memo: dict[Expr, Interval] = {}

    def go(x: Expr) -> Interval:
        if x not in memo:
            memo[x] = _interval(x, table, go)
        return memo[x]

    with np.errstate(invalid="ignore"):
        return go(e)


def _interval(x: Expr, table: Mapping[Any, Interval], go) -> Interval:
    value = E.constant(x)
    if value is not None:
        return float(value), float(value)
    if isinstance(x, sympy.Symbol):
        return table.get(x.name, UNKNOWN)
    op = E.op_of(x)
    if op == "load":
        return table.get(x, UNDECIDED if E.kind(x) == "bool" else UNKNOWN)
    if op is not None and E.kind(x) == "float":
        return UNKNOWN
    rule = RULES.get(op) if op is not None else FORMS.get(type(x))
    if rule is None:
        return UNDECIDED if E.kind(x) == "bool" else UNKNOWN
    return _exact(rule(*map(go, E.operands(x))))


def _exact(i: Interval) -> Interval:
    """Bounds too large to be exact, or undefined (0 * inf), become infinite."""
    low, high = i
    low = np.where(np.abs(low) < EXACT, low, np.where(low > 0, EXACT, -np.inf))
    high = np.where(np.abs(high) < EXACT, high, np.where(high < 0, -EXACT, np.inf))
    return low, high


def _add(*terms: Interval) -> Interval:
    low, high = terms[0]
    for other in terms[1:]:
        low, high = low + other[0], high + other[1]
    return low, high


def _corners(function, a: Interval, b: Interval) -> Interval:
    """Bounds of a function that is monotone in each argument."""
    values = [function(x, y) for x in a for y in b]
    low = high = values[0]
    for v in values[1:]:
        low, high = np.minimum(low, v), np.maximum(high, v)
    return low, high


def _mul(*factors: Interval) -> Interval:
    product = factors[0]
    for other in factors[1:]:
        product = _corners(np.multiply, product, other)
    return product


def _pow(base: Interval, exponent: Interval) -> Interval:
    n = exponent[0]
    if np.ndim(n) or n != exponent[1] or not 0 < n < 8:
        return UNKNOWN
    return _mul(*[base] * int(n))


def _floordiv(a: Interval, b: Interval) -> Interval:
    positive = b[0] >= 1
    low, high = _corners(lambda x, y: np.floor(x / np.maximum(y, 1)), a, b)
    return np.where(positive, low, -np.inf), np.where(positive, high, np.inf)


def _mod(a: Interval, b: Interval) -> Interval:
    """Python's sign: 0 <= a % b < b for a positive b; a itself, shifted, within one period."""
    positive, fixed = b[0] >= 1, b[0] == b[1]
    divisor = np.maximum(b[0], 1)
    period = np.floor(a[0] / divisor)
    same = positive & fixed & (period == np.floor(a[1] / divisor)) & np.isfinite(period)
    shift = np.where(same, period * divisor, 0.0)
    low = np.where(same, a[0] - shift, np.where(positive, 0.0, -np.inf))
    high = np.where(same, a[1] - shift, np.where(positive, b[1] - 1, np.inf))
    return low, high


def _where(c: Interval, a: Interval, b: Interval) -> Interval:
    always, never = c[0] == 1, c[1] == 0
    low = np.where(always, a[0], np.where(never, b[0], np.minimum(a[0], b[0])))
    high = np.where(always, a[1], np.where(never, b[1], np.maximum(a[1], b[1])))
    return low, high


def _abs(a: Interval) -> Interval:
    low, high = a
    crosses = (low <= 0) & (high >= 0)
    ends = np.abs(low), np.abs(high)
    return np.where(crosses, 0.0, np.minimum(*ends)), np.maximum(*ends)


def _le(e: Interval) -> Interval:
    return np.where(e[1] <= 0, 1.0, 0.0), np.where(e[0] > 0, 0.0, 1.0)


def _eq(e: Interval) -> Interval:
    zero, apart = (e[0] == 0) & (e[1] == 0), (e[0] > 0) | (e[1] < 0)
    return np.where(zero, 1.0, 0.0), np.where(apart, 0.0, 1.0)


def _each(function):
    """min and max act on both ends; and, or are min, max of booleans."""

    def rule(*items: Interval) -> Interval:
        low, high = items[0]
        for other in items[1:]:
            low, high = function(low, other[0]), function(high, other[1])
        return low, high

    return rule


RULES = {
    "//": _floordiv,
    "%": _mod,
    "where": _where,
    "abs": _abs,
    "neg": lambda a: (-a[1], -a[0]),
    "min": _each(np.minimum),
    "max": _each(np.maximum),
    "clamp_max": _each(np.minimum),
    "clamp_min": _each(np.maximum),
    "le": _le,
    "eq": _eq,
}
FORMS = {
    sympy.Add: _add,
    sympy.Mul: _mul,
    sympy.Pow: _pow,
    sympy.And: _each(np.minimum),
    sympy.Or: _each(np.maximum),
    sympy.Not: lambda a: (1.0 - a[1], 1.0 - a[0]),
}
