"""The text of an Expr, and back: `kv <= q & q - kv < 4096 & pad[b, kv]`.

Python's expression syntax with two differences: `& | ~` are the logical and, or, not and bind weaker
than comparisons. `parse(text(e)) == e` for every formula (tested by property).
"""

from __future__ import annotations

import ast
import re

import sympy
from sympy.core.symbol import Str

from . import expr as E
from .expr import Expr

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "//": "//", "%": "%"}
PRECEDENCE = {"|": 1, "&": 2, "~": 3, "cmp": 4, "+": 5, "-": 5, "*": 6, "/": 6, "//": 6, "%": 6, "neg": 7}
ATOM = 9
FLOAT_COMPARE = {"fle": "<=", "flt": "<", "feq": "=="}


def text(e: Expr) -> str:
    return _text(e)[0]


def _wrap(e: Expr, least: int) -> str:
    body, precedence = _text(e)
    return body if precedence >= least else f"({body})"


def _text(e: Expr) -> tuple[str, int]:
    """(text, precedence of its outermost operator)."""
    if isinstance(e, (sympy.And, sympy.Or)):
        sign = "&" if isinstance(e, sympy.And) else "|"
        p = PRECEDENCE[sign]
        return f" {sign} ".join(_wrap(a, p + 1) for a in _ordered(e.args)), p
    if isinstance(e, sympy.Not):
        inner = e.args[0]
        if E.op_of(inner) in ("eq", "feq"):
            return _call(E.op_of(inner), inner, negated=True)
        return "~" + _wrap(inner, ATOM), PRECEDENCE["~"]
    op = E.op_of(e)
    if op is not None:
        return _call(op, e)
    value = E.constant(e)
    if isinstance(value, bool):
        return str(value), ATOM
    if value is not None:
        return repr(value), ATOM if value >= 0 or value != value else PRECEDENCE["neg"]
    if isinstance(e, (sympy.Add, sympy.Mul, sympy.Pow)):
        return _polynomial(e)
    return str(e), ATOM


def _ordered(args: tuple[Expr, ...]) -> list[Expr]:
    """Formulas of positions first, captured tensors after them, each in text order."""
    return sorted(args, key=lambda a: (bool(E.loads(a)), len(text(a)), text(a)))


def _polynomial(e: Expr) -> tuple[str, int]:
    terms = [t.as_coeff_Mul() for t in sympy.Add.make_args(e)]
    if len(terms) > 1:
        terms.sort(key=lambda t: (bool(t[0] < 0), bool(t[1] == 1), text(t[1])))
    parts: list[str] = []
    for coefficient, rest in terms:
        magnitude = abs(coefficient)
        factors = [] if magnitude == 1 and rest != 1 else [str(magnitude)]
        if rest != 1:
            for base, power in (f.as_base_exp() for f in sympy.Mul.make_args(rest)):
                factors += [_wrap(base, PRECEDENCE["*"] + 1)] * int(power)
        sign = "-" if coefficient < 0 else "+"
        body = "*".join(factors)
        parts.append(f" {sign} {body}" if parts else (f"-{body}" if sign == "-" else body))
    return "".join(parts), PRECEDENCE["+"] if len(terms) > 1 else PRECEDENCE["*"]


def _call(op: str, e: Expr, negated: bool = False) -> tuple[str, int]:
    args = E.operands(e)
    if op in ("le", "eq"):
        return _compare(op, args[0], "!=" if negated else "==")
    if op in FLOAT_COMPARE:
        sign = "!=" if negated else FLOAT_COMPARE[op]
        return f"{_wrap(args[0], 5)} {sign} {_wrap(args[1], 5)}", PRECEDENCE["cmp"]
    if op == "load":
        return f"{args[0].name}[{', '.join(text(a) for a in args[1:]) or '()'}]", ATOM
    if op == "neg":
        return "-" + _wrap(args[0], PRECEDENCE["neg"]), PRECEDENCE["neg"]
    if op in INFIX:
        p = PRECEDENCE[INFIX[op]]
        gap = "" if p == 6 else " "
        return f"{_wrap(args[0], p)}{gap}{INFIX[op]}{gap}{_wrap(args[1], p + 1)}", p
    inner = ", ".join(a.name if isinstance(a, Str) else text(a) for a in args)
    return f"{op}({inner})", ATOM


def _compare(op: str, e: Expr, equal: str) -> tuple[str, int]:
    """e <= 0 or e == 0 with every term on the side where it is positive."""
    const, left, right = 0, sympy.Integer(0), sympy.Integer(0)
    for term in sympy.Add.make_args(e):
        coefficient, rest = term.as_coeff_Mul()
        if rest == 1:
            const = int(coefficient)
        elif coefficient > 0:
            left += term
        else:
            right -= term
    sign = "<=" if op == "le" else equal
    if op == "eq":
        swap = const > 0 or (const == 0 and E.mentions(right, E.Q) and not E.mentions(left, E.Q))
        left, right, const = (right, left, -const) if swap else (left, right, const)
    if op == "le" and const < 0 and right.has(E.KV) and left.has(E.Q) and not right.atoms(*E.CALLS):
        left, right = left - right, sympy.Integer(0)
    if right == 0 and op == "le" and const < 0:
        sign, right = "<", sympy.Integer(1 - const)
    elif const < 0:
        right -= const
    elif const > 0:
        left += const
    return f"{_wrap(left, 5)} {sign} {_wrap(right, 5)}", PRECEDENCE["cmp"]


def parse(source: str) -> Expr:
    """The Expr of a text. Raises ValueError with the text and the place."""
    python = re.sub(r"&", " and ", re.sub(r"\|", " or ", re.sub(r"~", " not ", source)))
    try:
        return _Reader().visit(ast.parse(python.strip(), mode="eval").body)
    except (SyntaxError, TypeError, KeyError) as error:
        raise ValueError(f"cannot read the formula {source!r}: {error}") from error


def capture_kind(name: str) -> str:
    """A capture's kind follows from its name: pad, mask: bool; ids: int; everything else: float."""
    stem = name.rstrip("0123456789")
    return {"pad": "bool", "mask": "bool", "ids": "int"}.get(stem, "float")


COMPARE = {
    ast.LtE: E.le,
    ast.Lt: E.lt,
    ast.GtE: lambda a, b: E.le(b, a),
    ast.Gt: lambda a, b: E.lt(b, a),
    ast.Eq: E.eq,
    ast.NotEq: lambda a, b: E.not_(E.eq(a, b)),
}
BINARY = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "//", ast.Mod: "%"}
FLOATS = {x.name: x for x in E.FLOATS}
CONSTANTS = {"inf": sympy.oo, "nan": sympy.nan, "True": E.TRUE, "False": E.FALSE}


class _Reader(ast.NodeVisitor):
    def generic_visit(self, node):
        raise SyntaxError(f"{type(node).__name__} is not part of a formula")

    def visit_BoolOp(self, node):
        return (E.and_ if isinstance(node.op, ast.And) else E.or_)(*map(self.visit, node.values))

    def visit_UnaryOp(self, node):
        x = self.visit(node.operand)
        return E.not_(x) if isinstance(node.op, ast.Not) else E.apply("neg", x)

    def visit_Compare(self, node):
        return COMPARE[type(node.ops[0])](self.visit(node.left), self.visit(node.comparators[0]))

    def visit_BinOp(self, node):
        return E.apply(BINARY[type(node.op)], self.visit(node.left), self.visit(node.right))

    def visit_Constant(self, node):
        return E.number(node.value)

    def visit_Name(self, node):
        if node.id in FLOATS:
            return FLOATS[node.id]
        return CONSTANTS[node.id] if node.id in CONSTANTS else E.index(node.id)

    def visit_Subscript(self, node):
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return E.load(node.value.id, capture_kind(node.value.id), *map(self.visit, items))

    def visit_Call(self, node):
        op, args = node.func.id, [self.visit(a) for a in node.args]
        if op == "where":
            return E.where(*args)
        if op == "int":
            return E.as_int(args[0])
        if op in E.CASTS:
            return E.as_float(args[0], op) if E.kind(args[0]) != "float" else E.FloatCall(op, *args)
        return E.apply(op, *args)
