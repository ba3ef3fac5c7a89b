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
    return E.apply("softplus", x) if a.get("beta", 1) == 1 and a.get("threshold", 20) == 20 else None


def _negative_side(x, below):
    return E.where(E.lt(E.number(0.0), x), x, below)


def _elu(x, a):
    if a.get("scale", 1) != 1 or a.get("input_scale", 1) != 1:
        return None
    return _negative_side(x, E.apply("mul", E.apply("expm1", x), E.number(float(a.get("alpha", 1)))))


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
    "leaky_relu": lambda x, a: _negative_side(x, E.apply("mul", x, E.number(float(a.get("negative_slope", 0.01))))),
    "elu": _elu,
}
