"""Activations, and powers, by their formulas.

A formula gets its operand and the arguments of the operation, and is None where this use of it has none.
"""

from __future__ import annotations

import math

from .. import expr as E
from ..expr import Expr


def power(x: Expr, y: Expr) -> Expr:
    """x ** y; powers that are products or roots are these, as PyTorch computes them too."""
    n = E.constant(y)
    if "float" not in (E.kind(x), E.kind(y)) or E.constant(x) is not None or n is None:
        return E.apply("pow", x, y)
    if abs(n) == 0.5:
        return E.apply("sqrt" if n > 0 else "rsqrt", x)
    if not 1 <= abs(n) <= 4 or n != int(n):
        return E.apply("pow", x, y)
    found = E.as_float(x)
    for _ in range(int(abs(n)) - 1):
        found = E.apply("mul", found, x)
    return found if n > 0 else E.apply("reciprocal", found)


def _gelu(x, a):
    """x * Phi(x), or its approximation by tanh"""
    if a.get("approximate", "none") == "tanh":
        cube = E.apply("mul", E.apply("mul", x, x), x)
        inner = E.apply(
            "mul", E.apply("add", x, E.apply("mul", cube, E.number(0.044715))), E.number((2 / math.pi) ** 0.5)
        )
        phi = E.apply("add", E.apply("tanh", inner), E.number(1.0))
    else:
        phi = E.apply("add", E.apply("erf", E.apply("mul", x, E.number(0.5**0.5))), E.number(1.0))
    return E.apply("mul", E.apply("mul", x, E.number(0.5)), phi)


def _clamped(x, low, high):
    return E.apply("clamp_max", E.apply("clamp_min", x, E.number(float(low))), E.number(float(high)))


def _softplus(x, a):
    beta = E.number(float(a.get("beta", 1)))
    if a.get("threshold", 20) != 20 or E.constant(beta) == 0:
        return None
    return (
        E.apply("softplus", x)
        if E.constant(beta) == 1
        else E.apply("div", E.apply("softplus", E.apply("mul", x, beta)), beta)
    )


def _negative_side(above, below, x):
    return E.where(E.lt(E.number(0.0), x), above, below)


def _elu(x, a):
    scale, inner = float(a.get("scale", 1)), float(a.get("input_scale", 1))
    below = E.apply("expm1", x if inner == 1 else E.apply("mul", x, E.number(inner)))
    below = E.apply("mul", below, E.number(float(a.get("alpha", 1)) * scale))
    return _negative_side(x if scale == 1 else E.apply("mul", x, E.number(scale)), below, x)


def _hard_sigmoid(x):
    return E.apply("div", _clamped(E.apply("add", x, E.number(3.0)), 0, 6), E.number(6.0))


def _softshrink(x, a):
    width = E.number(float(a.get("lambd", 0.5)))
    inside = E.where(E.lt(x, E.apply("neg", width)), E.apply("add", x, width), E.apply("mul", x, E.number(0.0)))
    return E.where(E.lt(width, x), E.apply("sub", x, width), inside)


def _hardshrink(x, a):
    width = float(a.get("lambd", 0.5))
    inside = E.and_(E.le(E.number(-width), x), E.le(x, E.number(width)))
    return E.where(inside, E.number(0.0), x)


# The constants of https://arxiv.org/abs/1706.02515 as PyTorch has them.
SELU = {"alpha": 1.6732632423543772848170429916717, "scale": 1.0507009873554804934193349852946}


ACTIVATIONS = {
    "silu": lambda x, a: E.apply("mul", x, E.apply("sigmoid", x)),
    "gelu": _gelu,
    "square": lambda x, a: E.apply("mul", x, x),
    "round": lambda x, a: None if a.get("decimals") else E.apply("round", x),
    "softplus": _softplus,
    "mish": lambda x, a: E.apply("mul", x, E.apply("tanh", E.apply("softplus", x))),
    "log_sigmoid": lambda x, a: E.apply("neg", E.apply("softplus", E.apply("neg", x))),
    "relu6": lambda x, a: _clamped(x, 0, 6),
    "hardtanh": lambda x, a: _clamped(x, a.get("min_val", -1), a.get("max_val", 1)),
    "leaky_relu": lambda x, a: _negative_side(x, E.apply("mul", x, E.number(float(a.get("negative_slope", 0.01)))), x),
    "elu": _elu,
    "celu": lambda x, a: _elu(x, {"alpha": a.get("alpha", 1), "input_scale": 1 / float(a.get("alpha", 1))}),
    "selu": lambda x, a: _elu(x, SELU),
    "hardsigmoid": lambda x, a: _hard_sigmoid(x),
    "hardswish": lambda x, a: E.apply("mul", x, _hard_sigmoid(x)),
    "softshrink": _softshrink,
    "hardshrink": _hardshrink,
    "threshold": lambda x, a: E.where(E.le(x, E.number(float(a["threshold"]))), E.number(float(a["value"])), x),
}
