"""Expr -> Triton: a formula becomes a small jit function that a kernel takes as a tl.constexpr.

    kv <= q & pad[b, kv]   ->   def formula(b, h, q, kv, data):
                                    captures, layout, sizes = data
                                    return (kv <= q) & (tl.load(captures[0] + ...) != 0)

    b, h scalars   q [M,1]   kv [1,N]   s [M,N], so parts free of q or kv are computed once per row or column

`data` is (pointers of the captures, their sizes and strides one after the other, the spec's own sizes). Loads clamp
their indices, as both sides of a `where` are evaluated. Floats are float32, booleans stored as bytes. Positions are
int32, unless a product of them may need more; captured integers keep their width, from 32 bits up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import sympy
import triton
import triton.language as tl

from .. import expr as E
from ..derive import derivative, underivable
from ..expr import Expr
from .launch import define

POSITIONS = ("b", "h", "q", "kv")
BLOCK_ENDS = ("b", "h", "h_last", "q_low", "q_high", "kv_low", "kv_high")
LARGE = 1 << 12  # times a position of up to 2^19 stays within 32 bits


@triton.jit
def floordiv(a, b):
    """a // b rounded down; Triton's own rounds to zero."""
    return tl.where((a % b != 0) & ((a < 0) != (b < 0)), a // b - 1, a // b)


@triton.jit
def mod(a, b):
    """a % b with the sign of b."""
    return tl.where((a % b != 0) & ((a < 0) != (b < 0)), a % b + b, a % b)


@triton.jit
def tanh(x):
    """1 - 2 / (exp(2x) + 1); near 0, where that cancels, x - x^3/3 + 2x^5/15"""
    square = x * x
    return tl.where(tl.abs(x) < 0.05, x * (1 - square * (1 / 3 - square * (2 / 15))), 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), and x itself from 20 on, as torch.nn.functional.softplus has it"""
    return tl.where(x > 20.0, x, tl.log(1 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def integer(x):
    """A captured integer, of at least 32 bits."""
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.int32)
    return x


@triton.jit
def raised(x, n: tl.constexpr):
    """x + n, at most the greatest number"""
    GREATEST: tl.constexpr = 2 ** (x.dtype.primitive_bitwidth - 1) - 1
    return tl.minimum(x, GREATEST - n) + n


@triton.jit
def inside(i, size):
    """A negative index counts from the end; an index outside becomes the nearest inside."""
    i = tl.where(i < 0, i + size, i)
    return tl.minimum(tl.maximum(i, 0), size - 1)


SIGNS = {"le": "<=", "lt": "<", "eq": "=="}
FUNCTIONS = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "neg": "(-{0})",
    "//": "floordiv({0}, {1})",
    "%": "mod({0}, {1})",
    "abs": "tl.abs({0})",
    "min": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "max": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "clamp_max": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "clamp_min": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "exp": "tl.exp({0})",
    "exp2": "tl.exp2({0})",
    "log": "tl.log({0})",
    "log2": "tl.log2({0})",
    "log1p": "tl.log(1 + {0})",
    "expm1": "(tl.exp({0}) - 1)",
    "relu": "tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "(1 / tl.sqrt({0}))",
    "reciprocal": "(1 / {0})",
    "sigmoid": "(1 / (1 + tl.exp(-{0})))",
    "tanh": "tanh({0})",
    "softplus": "softplus({0})",
    "erf": "tl.erf({0})",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "where": "tl.where({0}, {1}, {2})",
    "int": "({0}).to(tl.int32)",
    "fle": "({0} <= {1})",
    "flt": "({0} < {1})",
    "feq": "({0} == {1})",
    "float32": "({0}).to(tl.float32)",
    "float16": "({0}).to(tl.float16).to(tl.float32)",
    "bfloat16": "({0}).to(tl.bfloat16).to(tl.float32)",
}
JOINED = {sympy.Add: " + ", sympy.Mul: " * ", sympy.And: " & ", sympy.Or: " | "}


def unprintable(e: Expr) -> str | None:
    """What in the formula has no Triton form, or None."""
    for x in E.walk(e):
        op = E.op_of(x)
        if op == "pow" and not (E.constant(E.operands(x)[0]) or 0.0) > 0.0:
            return "a power has a Triton form only where its base is a positive number"
        if op is not None and op not in FUNCTIONS and op not in ("load", "le", "eq", "pow"):
            return f"{op} has no Triton form"
    return None


def unprintable_slopes(e: Expr, *parts: Expr) -> str | None:
    """What in the derivatives of the formula by these parts has no Triton form, or no derivative."""
    reasons = (unprintable(derivative(e, x)) for x in parts)
    return underivable(e, *parts) or next((reason for reason in reasons if reason is not None), None)


HELPERS = {f.__name__: f for f in (floordiv, mod, tanh, softplus, integer, raised, inside)}
Captures = tuple[tuple[str, int, bool], ...]  # (name, number of dims, whether offsets need 64 bits), in order


@functools.lru_cache(maxsize=4096)
def mint(e: Expr, captures: Captures, sizes: tuple[str, ...], scored: bool = False) -> triton.JITFunction:
    """The jit function of a formula.

    It takes (b, h, q, kv, data), after the score `s` if `scored`.
    """
    writer = _Writer(captures, sizes)
    value = writer.write(e)
    return _function("formula", ["s"] * scored, [*_widened(e), *writer.lines, f"return {value}"])


@functools.lru_cache(maxsize=4096)
def mint_unit(e: Expr) -> triton.JITFunction:
    """The jit function of an activation's formula, or of its derivative's: it takes float32 blocks (g, u)."""
    writer = _Writer((), ())
    value = writer.write(e)
    if not e.free_symbols:
        value = f"tl.full(u.shape, {value}, tl.float32)"
    return define("unit", ["g", "u"], [*writer.lines, f"return {value}"], HELPERS)


@functools.lru_cache(maxsize=4096)
def mint_gradients(e: Expr, wanted: tuple[str, ...], captures: Captures, sizes: tuple[str, ...]) -> triton.JITFunction:
    """The jit function that adds g * de/dcapture to the buffer `d NAME` among the captures, for each wanted one.

    It takes (g, s, b, h, q, kv, data); a part of a capture that one row, column or block
    shares is added up first. q [M,1], kv [1,N].
    """
    writer = _Writer(captures, sizes)
    for load in E.loads(e):
        name, *indices = E.operands(load)
        if name.name not in wanted or E.kind(load) != "float":
            continue
        slope = writer.write(derivative(e, load))
        number, offset = writer.place(f"d {name.name}", indices)
        held = [E.mentions(load, axis) for axis in (E.Q, E.KV)]
        value = f"tl.where(g != 0.0, g * {slope}, 0.0)"
        for axis in (1, 0):
            if not held[axis]:
                value = f"tl.sum({value}, {axis}, keep_dims=True)"
        shape = f"[{'g.shape[0]' if held[0] else '1'}, {'g.shape[1]' if held[1] else '1'}]"
        writer.lines.append(f"tl.atomic_add(captures[{number}] + tl.zeros({shape}, tl.int32){offset}, {value})")
    return _function("gradients", ["g", "s"], [*_widened(e), *writer.lines, "return"])


@functools.lru_cache(maxsize=4096)
def mint_kinds(low: Expr, high: Expr, captures: Captures, sizes: tuple[str, ...]) -> triton.JITFunction:
    """The jit function of a block's kind: 0 EMPTY, 1 PARTIAL, 2 FULL, from what bounds.ends says of it.

    It takes (b, h, h_last, q_low, q_high, kv_low, kv_high, data), one of the two sides as a vector of blocks.
    """
    writer = _Writer(captures, sizes)
    full, some = writer.write(low), writer.write(high)
    # Whatever the formulas mention, the kind is one of a vector of blocks.
    kind = f"tl.where({some}, tl.where({full}, 2, 1), 0) + (q_low + kv_low) * 0"
    lines = ["h_low, h_high = h, h_last", "q = q_low", *_widened(sympy.Tuple(low, high), BLOCK_ENDS[3:]), *writer.lines]
    return _function("kinds", [], [*lines, f"return {kind}"], BLOCK_ENDS)


def _widened(e: Expr, names: Sequence[str] = ("q", "kv")) -> list[str]:
    """Positions in 64 bits where the formula multiplies them with each other or by a large number."""
    for x in E.walk(e):
        coefficient, rest = x.as_coeff_Mul() if isinstance(x, sympy.Mul) else (0, None)
        if isinstance(x, sympy.Pow) or isinstance(rest, sympy.Mul) or abs(coefficient) >= LARGE:
            return [f"{name} = tl.cast({name}, tl.int64)" for name in names]
    return []


def _function(
    name: str, first: Sequence[str], lines: Sequence[str], positions: Sequence[str] = POSITIONS
) -> triton.JITFunction:
    return define(name, [*first, *positions, "data"], ["captures, layout, sizes = data", *lines], HELPERS)


class _Writer:
    """Writes every shared part of a formula once, as a line of its own."""

    def __init__(self, captures: Sequence[tuple[str, int, bool]], sizes: Sequence[str]):
        self.lines: list[str] = []
        self.names: dict[Expr, str] = {}
        self.sizes = {name: f"sizes[{i}]" for i, name in enumerate(sizes)}
        self.captures: dict[str, tuple[int, int, int, bool]] = {}
        start = 0
        for i, (name, dims, wide) in enumerate(captures):
            self.captures[name] = i, start, dims, wide
            start += 2 * dims

    def write(self, e: Expr) -> str:
        if e not in self.names:
            text = self._text(e)
            if e.args and not isinstance(e, (sympy.Float, sympy.Integer)):
                name = f"x{len(self.lines)}"
                self.lines.append(f"{name} = {text}")
                text = name
            self.names[e] = text
        return self.names[e]

    def _text(self, e: Expr) -> str:
        value = E.constant(e)
        if value is not None:
            return repr(value) if value == value and abs(value) != float("inf") else f'float("{value}")'
        if isinstance(e, sympy.Symbol):
            return self.sizes.get(e.name, e.name)
        op = E.op_of(e)
        if op == "load":
            return self._load(e)
        if op in ("le", "eq"):
            compare, left, right = E.sides(e)
            return f"({self._side(compare, left)} {SIGNS[compare]} {self._side(compare, right)})"
        if op == "pow":
            base, exponent = E.operands(e)
            return f"tl.exp2({self.write(exponent)} * {math.log2(E.constant(base))!r})"
        if op is not None:
            form = FUNCTIONS[op]
            if op in ("//", "%") and all(a.is_nonnegative for a in E.operands(e)):
                form = f"({{0}} {op} {{1}})"
            return form.format(*map(self.write, E.operands(e)))
        if isinstance(e, sympy.Not):
            return f"({self.write(e.args[0])} == 0)"
        if isinstance(e, sympy.Pow):
            return "(" + " * ".join([self.write(e.args[0])] * int(e.args[1])) + ")"
        return "(" + JOINED[type(e)].join(map(self.write, e.args)) + ")"

    def _side(self, compare: str, e: Expr) -> str:
        data = E.raised(compare, e)
        return self.write(e) if data is None else f"raised({self.write(data[0])}, {data[1]})"

    def _inside(self, index: Expr, size: str) -> str:
        if isinstance(index, sympy.Integer) and index >= 0:
            return str(index)
        value = self.write(index)
        return f"tl.minimum({value}, {size} - 1)" if index.is_nonnegative else f"inside({value}, {size})"

    def place(self, name: str, indices: Sequence[Expr]) -> tuple[int, str]:
        """(number of the capture, the offset as ` + ...`)"""
        number, start, dims, wide = self.captures[name]
        offsets = ""
        for d, index in enumerate(indices):
            at = self._inside(index, f"layout[{start + d}]") + ".to(tl.int64)" * wide
            offsets += f" + {at} * layout[{start + dims + d}]"
        return number, offsets

    def _load(self, e: Expr) -> str:
        name, *indices = E.operands(e)
        number, offset = self.place(name.name, indices)
        loaded = f"tl.load(captures[{number}]{offset})"
        kind = E.kind(e)
        return {"bool": f"({loaded} != 0)", "int": f"integer({loaded})", "float": f"{loaded}.to(tl.float32)"}[kind]
