"""Which numbers the tensors of indices hold.

topk(p, k)[1], argmax(p, -1)             0 .. E - 1, p's size along that dim
p.gather(-1, ids), one_hot(ids, E)       0 .. E - 1, or the program would have failed
W[ids]                                   -E .. E - 1, as negative ones count from the end
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import TYPE_CHECKING

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr
from .movement import Index, axis, unravel
from .overflow import FEW_BITS
from .ranges import ANY, Range

if TYPE_CHECKING:
    from .rows import RowReader

# Dtypes that do not hold the numbers of all experts, or of all pairs.
NARROW = (torch.bool, *FEW_BITS, torch.float16, torch.bfloat16)
ARGS = ("argmax", "argmin", "argsort")
KEPT = {"to", "clone", "contiguous", "detach", "alias", "view", "reshape", "unsqueeze", "squeeze", "t", "transpose"}
# Operations whose index, along `dim` of `self`, must be in range.
ALONG = ("gather", "scatter", "scatter_add", "scatter_reduce", "index_select", "index_add", "index_copy")


class Indices:
    """The ranges of what is read from the integer tensors of a graph."""

    def __init__(self, r: RowReader):
        self.r = r
        self.uses: dict[str, list[tuple[Expr, Range]]] = {}  # {tensor: [(any element of an index, its range)]}

    def range_of(self, load: Expr) -> Range:
        """Of an integer that is read from a tensor."""
        name = E.operands(load)[0].name
        if (size := self.found_in(self.r.nodes[name[1:]])) is not None:
            return sympy.Integer(0), size - 1
        for element, found in self.uses.get(name, ()):
            at: dict[Expr, Expr] = {}
            if unified(element, load, self.r.ranges, at) and all(map(self._is_position, at, at.values())):
                return found
        return ANY

    def _positions(self, shape: tuple[Expr, ...]) -> Iterator[Index]:
        """Any element by its place in each dim, and by its number."""
        yield tuple(self.r.fresh(n, "u") for n in shape)
        if len(shape) > 1:
            yield tuple(unravel(self.r.fresh(sympy.expand(sympy.Mul(*shape)), "u"), shape, self.r.bounds))

    def _is_position(self, symbol: Expr, value: Expr) -> bool:
        low, high = self.r.bounds(value)
        return low is not None and E.at_most(0, low) and E.at_most(high, self.r.ranges[symbol] - 1)

    def _written(self, load: Expr) -> bool:
        return self.r.changed(self.r.nodes[E.operands(load)[0].name[1:]], len(self.r.position))

    def look(self) -> None:
        """Finds the uses. A formula that is read meanwhile knows less, so it is read anew later."""
        r = self.r
        for node in r.position:
            for index, size, low in indexed(r, node):
                if index.meta["val"].dtype in (torch.bool, torch.uint8):
                    continue
                for at in self._positions(r.shape(index)):
                    element = r.read(index, at, r.position[node])
                    if E.op_of(element) == "load" and not any(map(self._written, E.loads(element))):
                        self.uses.setdefault(E.operands(element)[0].name, []).append((element, (low, size - 1)))
        r.forget()

    def found_in(self, node: fx.Node) -> Expr | None:
        """The size of the dim in which topk, max or argmax found places, alike in all parts of what was joined."""
        r = self.r
        while node.op == "call_function" and not r.changed(node, len(r.position)):
            if r.name(node) not in KEPT or node.meta["val"].dtype in NARROW:
                break
            node = node.args[0]
        if node.op != "call_function" or r.changed(node, len(r.position)):
            return None
        if r.name(node) == "multinomial":
            return r.shape(r.arguments(node)["self"])[-1]
        if r.name(node) in ("cat", "concat", "concatenate", "stack"):
            found = {self.found_in(part) for part in r.arguments(node)["tensors"]}
            return found.pop() if len(found) == 1 else None
        part = r.name(node) == "getitem" and node.args[1] == 1
        source = node.args[0] if part else node
        if not isinstance(source, fx.Node) or r.name(source) not in (("topk", "max", "sort", "min") if part else ARGS):
            return None
        a = r.arguments(source)
        shape = r.shape(a["self"])
        dim = a.get("dim", None if r.name(source) in ("max", "min", "argmax", "argmin") else -1)
        return None if dim is None else shape[axis(dim, len(shape))]


def indexed(r: RowReader, node: fx.Node) -> Iterator[tuple[fx.Node, Expr, Expr]]:
    """(index, the size that it must be below, the least it may be) of an operation that checks them."""
    name, zero = r.name(node) if node.op == "call_function" else "", sympy.Integer(0)
    a = r.arguments(node)
    if name in ALONG:
        shape = r.shape(a["self"])
        yield a["index"], shape[axis(a["dim"], len(shape))], zero
    elif name == "one_hot" and isinstance(a["num_classes"], int) and a["num_classes"] > 0:
        yield a["self"], sympy.Integer(a["num_classes"]), zero
    elif name == "embedding":
        yield a["indices"], r.shape(a["weight"])[0], zero
    elif name in ("index", "index_put"):
        shape = r.shape(a["self"])
        for d, index in enumerate(a["indices"] if not any(_is_mask(x) for x in a["indices"]) else ()):
            if index is not None:
                yield index, shape[d], -shape[d]


def _is_mask(index: fx.Node | None) -> bool:
    return index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)


def unified(pattern: Expr, e: Expr, symbols: Container[Expr], at: dict[Expr, Expr]) -> bool:
    """Is a formula the pattern with something in the places of its symbols? `at` takes what."""
    if pattern in symbols:
        return at.setdefault(pattern, e) == e
    if not pattern.args or pattern.func != e.func or len(pattern.args) != len(e.args):
        return pattern == e
    return all(unified(p, x, symbols, at) for p, x in zip(pattern.args, e.args))
