"""Appends nodes to a graph, with their fake values; keeps the strides that a program had."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Iterable, Sequence

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr
from .canonicalize import fake_mode_of
from .read import size

aten = torch.ops.aten


class Writer:
    """Appends nodes with their fake values before one node of the graph."""

    def __init__(self, graph: fx.Graph, before: fx.Node):
        self.graph, self.before = graph, before
        self.mode = fake_mode_of(before.meta.get("val")) or contextlib.nullcontext()
        self.sizes: dict[Expr, fx.Node | int] = {}

    def call(self, target, *args, **kwargs) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        if trace := self.before.meta.get("stack_trace"):
            node.meta["stack_trace"] = trace
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        return node

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A tensor in the dtype; a number of the program has none."""
        val = node.meta["val"]
        same = not isinstance(val, torch.Tensor) or val.dtype == dtype
        return node if same else self.call(aten.to.dtype, node, dtype)

    def size(self, e: Expr, sources: Sequence[fx.Node]):
        """A size formula as a number or a node."""
        if isinstance(e, sympy.Integer):
            return int(e)
        if e not in self.sizes:
            self.sizes[e] = self._size(e, sources)
        return self.sizes[e]

    def _size(self, e: Expr, sources: Sequence[fx.Node]):
        if (found := self._size_of(e, sources)) is not None:
            return found
        if type(e) in ARITHMETIC:
            terms = [self.size(x, sources) for x in e.args]
            return functools.reduce(lambda a, b: self.call(ARITHMETIC[type(e)], a, b), terms)
        if E.op_of(e) in ("//", "%"):
            pair = [self.size(x, sources) for x in E.operands(e)]
            return self.call(operator.floordiv if E.op_of(e) == "//" else operator.mod, *pair)
        # int(1.25 * tokens / experts), which the program computes.
        before = list(itertools.takewhile(lambda n: n is not self.before, self.graph.nodes))
        numbers = [n for n in before if isinstance(n.meta.get("val"), torch.SymInt)]
        if (found := self._size_of(e, (*numbers, *before))) is not None:
            return found
        raise ValueError(f"no tensor of the graph has the size {e}")

    def _size_of(self, e: Expr, sources: Iterable[fx.Node]) -> fx.Node | None:
        for node in sources:
            val = node.meta.get("val")
            if isinstance(val, torch.SymInt) and _same(val, e):
                return node
            if isinstance(val, torch.Tensor):
                for d, n in enumerate(val.shape):
                    if isinstance(n, torch.SymInt) and _same(n, e):
                        return self.call(aten.sym_size.int, node, d)
        return None


ARITHMETIC = {sympy.Add: operator.add, sympy.Mul: operator.mul, sympy.Pow: operator.pow}


def _same(n: torch.SymInt, e: Expr) -> bool:
    return size(n) == e


STRIDE_FREE = (aten.reshape.default, aten.contiguous.default)


def keep_strides(graph: fx.Graph, node: fx.Node, before: torch.Tensor) -> fx.Node:
    """Where a reader could tell that strides differ from the program's, copy into the program's."""
    if node.meta["val"].stride() == before.stride() or _strides_absorbed(node, before):
        return node
    users = list(node.users)
    w = Writer(graph, node.next)
    order = sorted(range(before.dim()), key=lambda d: (-before.stride()[d], d))
    copy = w.call(aten.permute.default, node, order) if order != sorted(order) else node
    copy = w.call(aten.clone.default, copy, memory_format=torch.contiguous_format)
    if order != sorted(order):
        copy = w.call(aten.permute.default, copy, [order.index(d) for d in range(len(order))])
    for user in users:
        user.replace_input_with(node, copy)
    return copy


def _strides_absorbed(node: fx.Node, before: torch.Tensor) -> bool:
    """Does every user give a result with the same strides as it did?"""
    for user in node.users:
        if user.op != "call_function" or not isinstance(user.meta.get("val"), torch.Tensor):
            return False
        if user.target in (aten.transpose.int, aten.permute.default):
            moved = user.target(before, *user.args[1:])
            user.meta["val"] = user.target(node.meta["val"], *user.args[1:])
            if not _strides_absorbed(user, moved):
                user.meta["val"] = moved
                return False
        elif user.target not in (*STRIDE_FREE, aten.linear.default, aten.clone.default):
            return False
    return True
