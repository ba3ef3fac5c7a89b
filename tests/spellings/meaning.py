"""Compares spec texts by what they say: evaluates their expressions at every (b, h, q, kv).

Captures are stand-ins, a fixed pseudo-random function of name and indices, so two texts agree if
they load the same things in the same places.
"""

from __future__ import annotations

import ast
import zlib
from dataclasses import dataclass

import torch

CLAUSES = ("scale", "score", "keep", "sink", "dropout", "empty")
FUNCTIONS = {
    "float": lambda x: torch.as_tensor(x).double(),
    "int": lambda x: torch.as_tensor(x).long(),
    "float64": lambda x: torch.as_tensor(x).double(),
    "float32": lambda x: torch.as_tensor(x).double(),
    "bfloat16": lambda x: torch.as_tensor(x).double(),
    "int64": lambda x: torch.as_tensor(x).long(),
    "int32": lambda x: torch.as_tensor(x).long(),
    "bool": lambda x: torch.as_tensor(x).bool(),
    "where": lambda c, a, b: torch.where(c, torch.as_tensor(a), torch.as_tensor(b)),
    "min": lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    "max": lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
}
BINARY = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a**b,
}
COMPARE = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}


@dataclass(frozen=True)
class Means:
    """A spec text up to algebra: same logit, keep and sink; other clauses letter by letter."""

    text: str


def clauses(text: str) -> dict[str, str]:
    """{'scale': '0.25', 'keep': 'kv <= q'}; ValueError on an unknown or misplaced clause."""
    parts = [part.partition("=") for part in text.split("; ")]
    found = {name.strip(): value.strip() for name, _, value in parts}
    order = [CLAUSES.index(name) for name in found]
    if order != sorted(order) or len(found) != len(parts):
        raise ValueError(f"clauses out of order in {text!r}")
    return found


def evaluate(text: str, scope: dict[str, object]) -> object:
    """The value of an expression; & | ~ bind looser than comparisons, as in a spec text."""
    words = text.replace("&", " and ").replace("|", " or ").replace("~", " not ")
    return _value(ast.parse(words.strip(), mode="eval").body, scope)


def _value(node: ast.expr, scope: dict[str, object]):
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return scope[node.id]
    if isinstance(node, ast.BoolOp):
        values = [torch.as_tensor(_value(v, scope)) for v in node.values]
        combine = torch.logical_and if isinstance(node.op, ast.And) else torch.logical_or
        return _fold(combine, values)
    if isinstance(node, ast.UnaryOp):
        value = _value(node.operand, scope)
        return torch.as_tensor(value).logical_not() if isinstance(node.op, ast.Not) else -value
    if isinstance(node, ast.BinOp):
        return BINARY[type(node.op)](_value(node.left, scope), _value(node.right, scope))
    if isinstance(node, ast.Compare):
        sides = [_value(n, scope) for n in [node.left, *node.comparators]]
        tests = [COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:])]
        return _fold(torch.logical_and, [torch.as_tensor(t) for t in tests])
    if isinstance(node, ast.Call):
        args = [_value(a, scope) for a in node.args]
        if node.func.id in FUNCTIONS:
            return FUNCTIONS[node.func.id](*args)
        return getattr(torch, node.func.id)(torch.as_tensor(args[0]).double(), *args[1:])
    if isinstance(node, ast.Subscript):
        index = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _load(node.value.id, [_value(i, scope) for i in index])
    raise ValueError(f"cannot evaluate {ast.dump(node)}")


def _fold(combine, values):
    result = values[0]
    for value in values[1:]:
        result = combine(result, value)
    return result


def _load(name: str, index: list):
    """A stand-in for a capture; a constant index 0 (a broadcast dim) does not count."""
    mixed = torch.tensor(float(zlib.crc32(name.encode()) % 1000))
    for i in index:
        if not (isinstance(i, int) and i == 0):
            mixed = torch.sin(mixed * 12.9898 + torch.as_tensor(i).double() * 78.233) * 43.7585
    unit = mixed - mixed.floor()
    if name.startswith(("pad", "mask")):
        return unit < 0.6
    return (unit * 5).long() if name.startswith("ids") else unit + 0.5


def positions(sizes: tuple[int, int, int, int]) -> dict[str, object]:
    """Index names bound to broadcastable positions for sizes (B, H, S_q, S_kv)."""
    B, H, S_q, S_kv = sizes
    scope: dict[str, object] = {
        "b": torch.arange(B).view(B, 1, 1, 1),
        "h": torch.arange(H).view(1, H, 1, 1),
        "q": torch.arange(S_q).view(S_q, 1),
        "kv": torch.arange(S_kv),
        "S_q": S_q,
        "S_kv": S_kv,
        "inf": float("inf"),
    }
    return scope


def same_meaning(expected: str, text: str, sizes: tuple[int, int, int, int]) -> bool:
    """Whether two spec texts compute the same attention at these sizes."""
    want, have = clauses(expected), clauses(text)
    if any(want.get(c) != have.get(c) for c in ("dropout", "empty")):
        return False
    if any((c in want) != (c in have) for c in ("keep", "sink")):
        return False
    scope = positions(sizes)
    for trial in range(2):
        gen = torch.Generator().manual_seed(trial)
        dots = 4 * torch.randn(sizes, generator=gen, dtype=torch.float64)
        a, b = _tensors(want, dots, scope), _tensors(have, dots, scope)
        kept = a["keep"].expand(sizes) if "keep" in a else torch.ones(sizes, dtype=torch.bool)
        if "keep" in a and not torch.equal(kept, b["keep"].expand(sizes)):
            return False
        if not torch.allclose(a["logit"].expand(sizes)[kept], b["logit"].expand(sizes)[kept], 1e-6):
            return False
        if "sink" in a and not torch.allclose(*torch.broadcast_tensors(a["sink"], b["sink"])):
            return False
    return True


def _tensors(parts: dict[str, str], dots: torch.Tensor, scope: dict) -> dict[str, torch.Tensor]:
    scope = {**scope, "s": dots * float(parts["scale"])}
    found = {"logit": torch.as_tensor(evaluate(parts.get("score", "s"), scope)).double()}
    if "keep" in parts:
        found["keep"] = torch.as_tensor(evaluate(parts["keep"], scope))
    if "sink" in parts:
        found["sink"] = torch.as_tensor(evaluate(parts["sink"], scope)).double()
    return found
