"""Calls that say in other words what one of the operations that are known says.

m = zeros(T, E); m[arange(T)[:, None], ids] = w     ->     zeros(T, E).scatter(-1, ids, w)
m = zeros(T, E); m[arange(T), first] = w            ->     where(e = first[t], w[t], 0), as a one-hot is
tensordot(x, W, ([1], [1]))                         ->     einsum("ab,cbd->acd", x, W)
"""

from __future__ import annotations

import contextlib
import string
from typing import Any

import sympy
import torch
from torch import fx

from .. import expr as E
from ..spec import Refuse
from .movement import axis
from .places import least, opened
from .read import Unreadable
from .rows import RowReader

Call = tuple[str, dict[str, Any]]  # an operation's name and its arguments by name


def find_synonyms(r: RowReader) -> dict[fx.Node, Call]:
    found = {}
    for n in r.position:
        rule = RULES.get(r.name(n)) if n.op == "call_function" else None
        if rule is not None:
            with contextlib.suppress(Refuse, Unreadable):  # what is not read stays what it is
                found[n] = rule(r, n)
    return {n: call for n, call in found.items() if call is not None}


def _as_einsum(r: RowReader, n: fx.Node) -> Call | None:
    a = r.arguments(n)
    x, y = a["self"], a["other"]
    ranks = len(r.shape(x)), len(r.shape(y))
    sums = [[axis(d, rank) for d in a[f"dims_{side}"]] for side, rank in zip(("self", "other"), ranks)]
    if [r.shape(x)[d] for d in sums[0]] != [r.shape(y)[d] for d in sums[1]]:
        return None  # a dim of 1 stretches
    left, right = (list(string.ascii_letters[start : start + rank]) for start, rank in zip((0, ranks[0]), ranks))
    for i, j in zip(*sums):
        right[j] = left[i]
    out = [c for c in left + right if (c in left) != (c in right)]
    return "einsum", {"equation": f"{''.join(left)},{''.join(right)}->{''.join(out)}", "tensors": [x, y]}


def _as_scatter(r: RowReader, n: fx.Node) -> Call | None:
    """m[p, ..., ids[p, ..., k]] = w[p, ..., k] at every p, or without k"""
    a, here, shape = r.arguments(n), r.position[n], r.shape(n)
    *rows, ids = a["indices"]
    if not rows or len(rows) + 1 != len(shape) or any(i is None or _is_mask(i) for i in a["indices"]):
        return None
    at, lead = tuple(r.fresh(size, "p") for size in r.shape(ids)), len(shape) - 1
    if r.shape(ids)[:lead] != shape[:-1] or len(at) > len(shape) or not all(_fits(r, i, ids) for i in rows):
        return None
    if any(r.operand(i, at, here) != p for i, p in zip(rows, at)):
        return None
    low = least(r, opened(r, E.as_int(r.read(ids, at, here)), ()))
    if low is None or low < 0:
        return None  # index_put counts from the end there, scatter does not
    call = {"self": a["self"], "dim": lead, "index": ids, "accumulate": a["accumulate"]}
    values = a["values"]
    if len(at) == lead:
        return "put_one", call | {"src": values}
    if r.shape(values) == r.shape(ids):
        return ("scatter_add" if a["accumulate"] else "scatter"), call | {"src": values}
    number = E.constant(r.read(values, (sympy.Integer(0),) * len(r.shape(values)), here))
    if number is None or a["accumulate"] or any(size != 1 for size in r.shape(values)):
        return None
    return "scatter", call | {"value": number}


def _fits(r: RowReader, index: fx.Node, ids: fx.Node) -> bool:
    """Do the ids have every place that an index beside them has?"""
    small, large = r.shape(index), r.shape(ids)
    return len(small) <= len(large) and all(n in (1, m) for n, m in zip(reversed(small), reversed(large)))


def _is_mask(index: fx.Node) -> bool:
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


RULES = {"index_put": _as_scatter, "tensordot": _as_einsum}
