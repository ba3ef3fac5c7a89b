"""d e / d x: the derivative of a float formula by a part of it, as a formula.

    tanh(s/c)*c   by s   ->   1 - tanh(s/c)**2

Bounds split a gradient as PyTorch does: minimum and maximum give each of two equal sides a half, clamp gives all to the
value. A cast between floats lets the gradient through.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from . import expr as E
from .expr import Expr

ZERO, ONE = E.number(0.0), E.number(1.0)


def derivative(e: Expr, x: Expr) -> Expr:
    """Raises ValueError where an operation has no rule."""
    memo: dict[Expr, Expr] = {x: ONE}

    def go(y: Expr) -> Expr:
        if y not in memo:
            memo[y] = ZERO if not _holds(y, x) else _derivative(y, go)
        return memo[y]

    return go(e)


def underivable(e: Expr, *parts: Expr) -> str | None:
    """What has no derivative by one of these parts."""
    try:
        for x in parts:
            derivative(e, x)
    except ValueError as error:
        return str(error)
    return None


def _holds(y: Expr, x: Expr) -> bool:
    return E.kind(y) == "float" and any(part == x for part in E.walk(y))


def _derivative(e: Expr, go: Callable[[Expr], Expr]) -> Expr:
    op, args = E.op_of(e), E.operands(e)
    if op == "where":
        c, a, b = args
        return E.where(c, go(a), go(b))
    if op in E.CASTS:
        return go(args[0])
    if op not in RULES:
        raise ValueError(f"no derivative of {op} in {e}")
    return RULES[op](e, *args, *map(go, args))


def add(a: Expr, b: Expr) -> Expr:
    return b if a == ZERO else a if b == ZERO else E.apply("add", a, b)


def sub(a: Expr, b: Expr) -> Expr:
    return a if b == ZERO else E.apply("neg", b) if a == ZERO else E.apply("sub", a, b)


def mul(a: Expr, b: Expr) -> Expr:
    if ZERO in (a, b):
        return ZERO
    return b if a == ONE else a if b == ONE else E.apply("mul", a, b)


def chain(factor: Expr, d: Expr) -> Expr:
    """factor times a derivative. What a choice did not let through stays 0, whatever it is multiplied by."""
    found = _let_through(d, lambda x: chain(factor, x))
    return mul(factor, d) if found is None else found


def div(d: Expr, b: Expr) -> Expr:
    """A derivative divided by a value."""
    found = _let_through(d, lambda x: div(x, b))
    return found if found is not None else ZERO if d == ZERO else E.apply("div", d, b)


def _let_through(d: Expr, of: Callable[[Expr], Expr]) -> Expr | None:
    """of(d) where d is a choice between a derivative and 0, as those of relu and clamp are."""
    if E.op_of(d) != "where" or ZERO not in E.operands(d)[1:]:
        return None
    c, a, b = E.operands(d)
    return E.where(c, ZERO if a == ZERO else of(a), ZERO if b == ZERO else of(b))


def _extreme(first_wins: Callable[[Expr, Expr], Expr]) -> Callable:
    def rule(e: Expr, a: Expr, b: Expr, da: Expr, db: Expr) -> Expr:
        half = chain(E.number(0.5), add(da, db))
        return E.where(E.compare_float("eq", a, b), half, E.where(first_wins(a, b), da, db))

    return rule


def _scaled(factor: Callable[[Expr, Expr], Expr]) -> Callable:
    """The rule of a function of one operand: factor(value, operand) times the operand's derivative."""
    return lambda e, a, da: chain(factor(e, a), da)


def _less(a: Expr, b: Expr) -> Expr:
    return E.compare_float("lt", a, b)


def _at_most(a: Expr, b: Expr) -> Expr:
    return E.compare_float("le", a, b)


def _power(e: Expr, a: Expr, b: Expr, da: Expr, db: Expr) -> Expr:
    """0 ** b does not move with b >= 0."""
    still = E.and_(E.compare_float("eq", a, ZERO), _at_most(ZERO, b))
    by_b = ZERO if db == ZERO else E.where(still, ZERO, chain(mul(e, E.apply("log", a)), db))
    by_a = chain(mul(b, E.apply("pow", a, E.apply("sub", b, ONE))), da)
    return add(by_a if b != ZERO else ZERO, by_b)


def _logaddexp(e: Expr, a: Expr, b: Expr, da: Expr, db: Expr) -> Expr:
    share = E.apply("sigmoid", E.apply("sub", a, b))
    return add(chain(share, da), chain(sub(ONE, share), db))


def _remainder(e: Expr, a: Expr, b: Expr, da: Expr, db: Expr) -> Expr:
    return sub(da, chain(E.apply("floor", E.apply("div", a, b)), db))


def _number(x: float) -> Expr:
    return E.number(x)


RULES: dict[str, Callable] = {
    "add": lambda e, a, b, da, db: add(da, db),
    "sub": lambda e, a, b, da, db: sub(da, db),
    "mul": lambda e, a, b, da, db: add(chain(b, da), chain(a, db)),
    "div": lambda e, a, b, da, db: div(sub(da, chain(e, db)), b),
    "neg": lambda e, a, da: E.apply("neg", da),
    "abs": _scaled(lambda e, a: E.where(_less(a, ZERO), _number(-1.0), E.where(_less(ZERO, a), ONE, ZERO))),
    "min": _extreme(_less),
    "max": _extreme(lambda a, b: _less(b, a)),
    "clamp_max": lambda e, a, b, da, db: E.where(_at_most(a, b), da, db),
    "clamp_min": lambda e, a, b, da, db: E.where(_at_most(b, a), da, db),
    "exp": _scaled(lambda e, a: e),
    "exp2": _scaled(lambda e, a: mul(_number(math.log(2)), e)),
    "expm1": _scaled(lambda e, a: add(e, ONE)),
    "log": lambda e, a, da: div(da, a),
    "log2": lambda e, a, da: div(da, mul(_number(math.log(2)), a)),
    "log1p": lambda e, a, da: div(da, add(a, ONE)),
    "sqrt": lambda e, a, da: div(chain(_number(0.5), da), e),
    "rsqrt": _scaled(lambda e, a: div(mul(_number(-0.5), e), a)),
    "reciprocal": _scaled(lambda e, a: E.apply("neg", mul(e, e))),
    "relu": _scaled(lambda e, a: E.where(_less(ZERO, a), ONE, ZERO)),
    "tanh": _scaled(lambda e, a: sub(ONE, mul(e, e))),
    "sigmoid": _scaled(lambda e, a: mul(e, sub(ONE, e))),
    "softplus": _scaled(lambda e, a: E.apply("sigmoid", a)),
    "erf": _scaled(lambda e, a: mul(_number(2 / math.sqrt(math.pi)), E.apply("exp", E.apply("neg", mul(a, a))))),
    "sin": _scaled(lambda e, a: E.apply("cos", a)),
    "cos": _scaled(lambda e, a: E.apply("neg", E.apply("sin", a))),
    "pow": _power,
    "logaddexp": _logaddexp,
    "remainder": _remainder,
    **dict.fromkeys(("floor", "ceil", "round", "trunc", "sign"), lambda e, a, da: ZERO),
}
