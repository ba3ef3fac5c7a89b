"""The formula of a tensor's element: abstract interpretation of pre-dispatch ATen over index positions.

    reader.read(node, (b, h, q, kv)) -> Expr

Movement changes the index, pointwise operations build formulas, creation operations are formulas of
the index, contractions and reductions become atoms that `lift_attention` opens, and everything else is
a load of a captured tensor `%node[...]`. Nothing is executed and nothing is written.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import sympy
import torch
from sympy.core.symbol import Str
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from .. import expr as E
from ..expr import Expr
from .movement import MOVEMENT, Index
from .overflow import fits, range_of_dtype, wraps_a_scalar
from .pointwise import POINTWISE
from .ranges import Memo, Range, interval
from .writes import storage_of, written_arguments


class Unreadable(Exception):
    """A size or scalar that has no formula."""


class Reader:
    """Formulas of one graph. Memoized: layers that share a mask share its formula."""

    def __init__(self, graph: fx.Graph):
        fix_feature_sizes(graph)
        self.position = {n: i for i, n in enumerate(graph.nodes)}
        self.ranges: dict[sympy.Symbol, Expr] = {}
        self.used_at: dict[fx.Node, int] = {}
        self.nodes: dict[str, fx.Node] = {n.name: n for n in graph.nodes}
        self._formulas: dict[tuple[fx.Node, Index], Expr] = {}
        self._bounds: Memo = {}
        self._writes: dict[int, list[int]] = {}
        self.asked: dict[tuple[str, fx.Node], Any] = {}  # what counts.py found out of sums
        self._fresh = 0
        for n in graph.nodes:
            for x in written_arguments(n):
                if (key := storage_of(x)) is not None:
                    self._writes.setdefault(key, []).append(self.position[n])

    # Sizes and scalars

    def shape(self, node: fx.Node) -> tuple[Expr, ...]:
        return self.shape_of(node.meta["val"])

    def shape_of(self, tensor: torch.Tensor) -> tuple[Expr, ...]:
        return tuple(size(n) for n in tensor.shape)

    def scalar(self, value) -> Expr:
        """The formula of a scalar argument: a number or a node that holds one."""
        if isinstance(value, fx.Node):
            held = value.meta.get("val")
            if isinstance(held, (int, float, bool)):
                return E.number(held)
            if isinstance(held, torch.SymInt):
                return size(held)
            if isinstance(held, torch.SymFloat):
                known = held.node.maybe_as_float()
                return E.number(known) if known is not None else self.leaf(value, ())
            raise Unreadable(f"the scalar {value.name} has no formula")
        if isinstance(value, torch.SymInt):
            return size(value)
        return E.number(value)

    def with_numbers(self, e: Expr) -> Expr:
        """A formula in which floats that may change (a module's, with dynamic shapes) are what they are, guarded."""
        held = {x: self.nodes[E.operands(x)[0].name[1:]].meta["val"] for x in E.loads(e)}
        floats = {x: v for x, v in held.items() if isinstance(v, torch.SymFloat) and not free_unbacked_symbols(v)}
        return E.substitute(e, {x: E.number(v.node.guard_float("", 0)) for x, v in floats.items()}) if floats else e

    def place(self, value, source: fx.Node, dim: int, clamped: bool = False) -> Expr:
        """A place along a dim that may count from the end; its sign is guarded where it is symbolic."""
        held, size_ = value.meta["val"] if isinstance(value, fx.Node) else value, source.meta["val"].shape[dim]
        if isinstance(held, int) and held >= 0:
            return self.scalar(held)
        if free_unbacked_symbols((held, size_)):
            raise Unreadable("whether a place counts from the end is not known")
        held = held + size_ if held < 0 else held
        return self.scalar(0 if clamped and held < 0 else held)

    # Index symbols and what is known of their range

    def fresh(self, size: Expr, stem: str = "i") -> Expr:
        """A new index position in [0, size); the constant 0 where size is 1."""
        if size == 1:
            return sympy.Integer(0)
        self._fresh += 1
        symbol = E.index(f"{stem}{self._fresh}")
        self.ranges[symbol] = size
        return symbol

    def bounds(self, e: Expr) -> tuple:
        """(low, high) of an integer formula, in terms of sizes; (None, None) where unknown."""
        found = interval(e, self.range_of, self._bounds)
        return (None, None) if None in found else found

    def forget(self) -> None:
        """More is known than when formulas were read."""
        self._formulas.clear()
        self._bounds.clear()

    def range_of(self, e: Expr) -> Range | None:
        """What is known of a position, or of what is read from a tensor."""
        if E.op_of(e) == "load" and E.kind(e) == "int":
            return range_of_dtype(self.nodes[E.operands(e)[0].name[1:]].meta["val"].dtype)
        return (sympy.Integer(0), self.ranges[e] - 1) if e in self.ranges else None

    def truth(self, e: Expr) -> Expr:
        """A boolean formula with the comparisons that always, or never, hold decided."""
        table = {}
        for call in e.atoms(E.BoolCall):
            op = E.op_of(call)
            if op not in ("le", "eq"):
                continue
            low, high = self.bounds(E.operands(call)[0])
            if low is None:
                continue
            if E.at_most(1, low) or (op == "eq" and E.at_most(high, -1)):
                table[call] = E.FALSE
            elif op == "le" and E.at_most(high, 0):
                table[call] = E.TRUE
        return E.substitute(e, table) if table else e

    # Tensors

    def arguments(self, node: fx.Node) -> dict:
        """The arguments of an ATen call by their schema's names, defaults included."""
        if not isinstance(node.target, OpOverload):
            return {}
        bound = {}
        for i, argument in enumerate(node.target._schema.arguments):
            if i < len(node.args):
                bound[argument.name] = node.args[i]
            elif argument.name in node.kwargs:
                bound[argument.name] = node.kwargs[argument.name]
            elif argument.has_default_value():
                bound[argument.name] = argument.default_value
        return bound

    def name(self, node: fx.Node) -> str:
        """`softmax` for aten.softmax.int, `getitem` for operator.getitem, else the qualified name."""
        if isinstance(node.target, OpOverload):
            return node.target._schema.name.removeprefix("aten::")
        return "getitem" if node.target is operator.getitem else str(node.target)

    def broadcast(self, source: fx.Node, idx: Index) -> Index:
        shape = self.shape(source)
        tail = idx[len(idx) - len(shape) :]
        return tuple(sympy.Integer(0) if n == 1 else x for n, x in zip(shape, tail))

    def changed(self, node: fx.Node, before: int) -> bool:
        """Is the memory of `node` written after it is made and before position `before`?"""
        return self.changed_between(node, self.position[node], before)

    def changed_between(self, node: fx.Node, start: int, stop: int) -> bool:
        key = storage_of(node)
        return key is not None and any(start < w < stop for w in self._writes.get(key, ()))

    def operand(self, value, idx: Index, at: int) -> Expr:
        """The formula of an argument of a pointwise operation whose result has index `idx`."""
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
            return self.read(value, self.broadcast(value, idx), at)
        return self.scalar(value)

    def step(self, node: fx.Node, idx: Index) -> tuple[fx.Node, Index] | None:
        """Through one operation that only moves data, or None."""
        rule = MOVEMENT.get(self.name(node)) if node.op == "call_function" else None
        if rule is None:
            return None
        try:
            return rule(self, self.arguments(node), node, idx)
        except Unreadable:
            return None

    def path(self, node: fx.Node, idx: Index, at: int) -> list[tuple[fx.Node, Index, int]]:
        """Back through operations that only move data: (tensor, index, the position of what reads it), the source last.

        It ends at a tensor that is written to before it is read.
        """
        found = [(node, idx, at)]
        while not self.changed(node, at) and (moved := self.step(node, idx)) is not None:
            at = self.position[node]
            node, idx = moved
            found.append((node, idx, at))
        return found

    def read(self, node: fx.Node, idx: Index, at: int) -> Expr:
        """The formula of node[idx] as the operation at position `at` sees it."""
        if self.changed(node, at):
            return self.leaf(node, idx, at)
        key = (node, idx)
        if key not in self._formulas:
            self._formulas[key] = self._read(node, idx)
        formula = self._formulas[key]
        if E.op_of(formula) == "load":
            self._note_use(node, at)
        return formula

    def _read(self, node: fx.Node, idx: Index) -> Expr:
        if node.op == "get_attr" and (value := self.constant(node)) is not None:
            return value
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            return self.leaf(node, idx)
        here = self.position[node]
        moved = self.step(node, idx)
        if moved is not None:
            return self.read(*moved, here)
        rule = POINTWISE.get(self.name(node))
        try:
            formula = rule(self, self.arguments(node), node, idx) if rule else None
        except Unreadable:
            formula = None
        return self.result(node, idx, formula)

    def result(self, node: fx.Node, idx: Index, formula: Expr | None) -> Expr:
        """The formula of a result in its dtype, or a load of it where there is none that holds."""
        dtype = node.meta["val"].dtype
        if formula is None or wraps_a_scalar(node):
            return self.leaf(node, idx)
        formula = self.coerce(formula, dtype)
        return formula if fits(self, formula, dtype) else self.leaf(node, idx)

    def constant(self, node: fx.Node) -> Expr | None:
        """The value of a tensor literal of one element."""
        held = functools.reduce(getattr, node.target.split("."), node.graph.owning_module)
        if not isinstance(held, torch.Tensor) or held.numel() != 1 or isinstance(held, torch.nn.Parameter):
            return None
        with torch.utils._python_dispatch._disable_current_modes():
            return None if isinstance(held, FakeTensor) else E.number(held.item())

    def coerce(self, e: Expr, dtype: torch.dtype) -> Expr:
        if dtype == torch.bool:
            return self.truth(E.as_bool(e))
        if dtype.is_floating_point:
            e = E.as_float(e, str(dtype).removeprefix("torch."))
            constant = all(E.constant(x) is not None for x in E.leaves(e))
            return E.choose(lambda x: rounded(x, dtype), e) if constant else e
        return E.as_int(e)

    def is_opened(self, node: fx.Node) -> bool:
        """Whether more is read of loads of this tensor later, so that a cast of it must show it."""
        return False

    def leaf(self, node: fx.Node, idx: Index, at: int | None = None) -> Expr:
        """A load of a captured tensor."""
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            dtype = val.dtype
            of_kind = "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"
            if dtype.is_complex:
                raise Unreadable("complex tensors have no formula")
            idx = tuple(sympy.Integer(0) if n == 1 else x for n, x in zip(self.shape(node), idx))
        else:
            of_kind = "float"
        self._note_use(node, self.position[node] if at is None else at)
        return E.load(f"%{node.name}", of_kind, *idx)

    def _note_use(self, node: fx.Node, at: int) -> None:
        self.used_at[node] = min(at, self.used_at.get(node, at))

    def atom(self, op: str, node: fx.Node, idx: Index) -> Expr:
        """An operation that the reader does not open: `dot`, `softmax`, `reduce`, `dropout`."""
        return E.FloatCall(op, Str(node.name), *idx)


def rounded(e: Expr, dtype: torch.dtype) -> Expr:
    """A constant as the dtype holds it: finfo.min twice is -inf."""
    return E.number(torch.tensor(E.constant(e), dtype=torch.float64).to(dtype).item())


def size(value: int | torch.SymInt) -> Expr:
    """The formula of a size."""
    if isinstance(value, torch.SymInt):
        shape_env = value.node.shape_env
        return from_shape_env(shape_env.replace(value.node.expr) if shape_env else value.node.expr)
    return sympy.Integer(int(value))


def fix_feature_sizes(graph: fx.Graph) -> None:
    """Guard on D where a scale is computed from it: kernels are made for one D, and D seldom changes."""
    for n in graph.nodes:
        val = n.meta.get("val")
        if isinstance(val, torch.SymFloat):
            e = val.node.expr
            sizes = [str(x) for x in e.free_symbols]
            if len(sizes) == 1 and sizes[0].startswith("s") and "log" not in str(e):
                val.node.shape_env.evaluate_expr(next(iter(e.free_symbols)))
        elif "scaled_dot_product_attention" in str(n.target) and n.kwargs.get("scale") is None:
            int(n.args[0].meta["val"].shape[-1])


def from_shape_env(e: sympy.Expr) -> Expr:
    """A size formula of torch's shape environment in our own words."""
    from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

    if isinstance(e, (sympy.Integer, sympy.Symbol)) or not e.args:
        return e
    args = [from_shape_env(a) for a in e.args]
    if isinstance(e, FloorDiv):
        return E.floordiv(*args)
    if isinstance(e, (Mod, PythonMod)):
        return E.mod(*args)
    if isinstance(e, (sympy.Add, sympy.Mul, sympy.Pow)):
        return sympy.expand(e.func(*args))
    # Of a maximum, say, nothing is known but that it is the same number everywhere.
    return sympy.Symbol(f"size[{e}]", integer=True, nonnegative=True)
