"""Derivatives of formulas, against autograd over the formula's torch form."""

from __future__ import annotations

import pytest
import torch

from tvcompile import expr as E, syntax
from tvcompile.derive import RULES, derivative
from tvcompile.kernels import mods
from tvcompile.kernels.problem import Problem
from tvcompile.passes.activations import power
from tvcompile.passes.pointwise import POINTWISE, UNARY

FORMULAS = [
    "5.0*tanh(s/5.0) + bias[h]",
    "s*bias[h]/(bias[h] + 3.0) - float32(kv)*bias[h]",
    "where(kv <= q, exp(s) - log(abs(s) + 1.0), sigmoid(s)*s)",
    "sqrt(s*s + 1.0) + rsqrt(s*s + 2.0) + softplus(s)",
    "min(s, 0.3) + max(s, bias[h])*2.0 + clamp_min(s, -0.5) + clamp_max(s, 0.7)",
    "erf(s) + sin(s)*cos(s) + reciprocal(s*s + 1.0) + exp2(s) + log1p(s*s) + log2(s*s + 1.0)",
    "floor(s)*s + abs(s) + sign(s)*s",
    "pow(bias[h], s) + pow(abs(s), 2.5) + pow(abs(s), bias[h] + 1.0)",
    "logaddexp(s, bias[h]) + remainder(s, bias[h] + 0.1)",
]
# What a reader makes of operations of one and of two numbers.
READ = (*UNARY, "exp", "softplus", "round", "add", "sub", "mul", "div", "pow", "max", "min", "logaddexp", "remainder")


@pytest.mark.parametrize("text", FORMULAS)
def test_a_derivative_is_what_autograd_finds(text):
    e = syntax.parse(text)
    s, bias = torch.randn(2, 3, 16, 8, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    s[0, 0, 0, 0] = 0.0
    scope = Problem.of(*[torch.zeros(2, 3, 16, 8, dtype=torch.float64)] * 3, [], [], "scale=1", None).scope
    scope = scope.at(captures={"bias": bias}, s=s.requires_grad_(), kv=(0, 8), wanted=("bias",), taps=[])
    value = mods.tensor(e, scope).expand_as(s)
    loads = E.loads(e)
    leaves = [s, *(tap.leaf for tap in scope.taps[:1])]
    found = torch.autograd.grad(value.sum(), leaves)
    plain = scope.at(s=s.detach(), taps=None)
    for x, leaf, want in zip([E.S, *loads], leaves, found):
        got = mods.tensor(derivative(e, x), plain).expand_as(s)
        extra = [d for d in range(4) if leaf.shape[d] == 1 != s.shape[d]]
        torch.testing.assert_close(got.sum(extra, keepdim=True) if extra else got, want)


def test_a_part_that_is_not_there_has_no_slope():
    assert derivative(syntax.parse("tanh(s)"), syntax.parse("bias[h]")) == E.number(0.0)
    assert derivative(syntax.parse("s + bias[h, q, kv]"), E.S) == E.number(1.0)


@pytest.mark.parametrize("text", ["pow(relu(s), 0.7)", "sqrt(relu(s))", "sqrt(clamp_min(s, 0.0))"])
def test_what_is_not_let_through_is_zero_even_times_infinity(text):
    e = syntax.parse(text)
    s = torch.tensor([-1.0, -2.0, 3.0], dtype=torch.float64).view(1, 1, 3, 1).requires_grad_()
    scope = Problem.of(*[torch.zeros(1, 1, 3, 1, dtype=torch.float64)] * 3, [], [], "scale=1", None).scope
    (want,) = torch.autograd.grad(mods.tensor(e, scope.at(captures={}, s=s, kv=(0, 1))).sum(), s)
    got = mods.tensor(derivative(e, E.S), scope.at(captures={}, s=s.detach(), kv=(0, 1)))
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("n", [float("inf"), float("-inf"), float("nan"), 1e300, 5.0, 0.0, 2.5])
def test_powers_that_are_no_products_stay_powers(n):
    assert E.op_of(power(E.S, E.number(n))) == "pow"


def test_all_that_is_read_of_floats_has_a_rule():
    assert set(READ) <= set(RULES)
    binary = {op for op, rule in POINTWISE.items() if rule.__qualname__.startswith("_binary")}
    assert {"subtract": "sub", "multiply": "mul", "maximum": "max", "minimum": "min"}.keys() <= binary
    assert binary - {"subtract", "multiply", "maximum", "minimum"} <= set(RULES)


def test_what_has_no_rule_is_an_error():
    with pytest.raises(ValueError, match="no derivative of"):
        derivative(E.FloatCall("gamma", E.S), E.S)
