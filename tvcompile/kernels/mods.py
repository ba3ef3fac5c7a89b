"""Expr -> torch: evaluates a formula over a block of positions.

A formula becomes a tape of torch calls, in which a shared part appears once. Positions broadcast:

    b [X,1,1,1]   h [1,H,1,1]   q [1,1,M,1]   kv [1,1,1,N]   s [X,H,M,N]

so `kv <= q` is one [1,1,M,N] comparison and `pad[b, kv]` one [B,1,1,N] view. A load whose indices are
plain positions is a view of the capture, any other an advanced index. Loads clamp their indices, since
`where(kv < 4, first[kv], rest[kv - 4])` evaluates both sides. Not in place; differentiable.

A scope may hold a stack of blocks: block i of batch element b is x = b*stack + i of X, and its q and
kv are the first block's, shifted by i*M: q [X,1,M,1], kv [X,1,1,N].

Gradients of captures: with `taps`, what is loaded from a named capture becomes a leaf of autograd, and
a Tap remembers where the leaf's gradient is to be added.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from .. import expr as E
from ..expr import Expr

GREATEST = torch.iinfo(torch.int64).max
AXES = ("b", "h", "q", "kv")
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Tap:
    """A loaded part of a capture: its leaf, and add(buffer like the capture, gradient of the leaf)."""

    name: str
    leaf: Tensor
    add: Callable[[Tensor, Tensor], None]


@dataclasses.dataclass(frozen=True)
class Scope:
    """What the names of a formula stand for: a block of positions, captures, sizes, the score."""

    b: Span
    h: Span
    q: Span
    kv: Span
    captures: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device
    s: Tensor | None = None
    stack: int = 1
    wanted: tuple[str, ...] = ()
    taps: list[Tap] | None = None

    def at(self, **changes: Any) -> Scope:
        return dataclasses.replace(self, **changes)

    @functools.cached_property
    def _indices(self) -> dict[str, Tensor]:
        return {}

    def index(self, axis: str) -> Tensor:
        if axis not in self._indices:
            start, stop = getattr(self, axis)
            shape = [-1 if a == axis else 1 for a in AXES]
            found = torch.arange(start, stop, device=self.device).view(shape)
            self._indices[axis] = found if self.stack == 1 else self._stacked(axis, found)
        return self._indices[axis]

    def _stacked(self, axis: str, found: Tensor) -> Tensor:
        if axis == "b":
            return found.repeat_interleave(self.stack, 0)
        if axis == "h":
            return found
        batch, rows = self.b[1] - self.b[0], self.q[1] - self.q[0]
        shift = torch.arange(self.stack, device=self.device).repeat(batch) * rows
        return found + shift.view(-1, 1, 1, 1)

    def value(self, name: str) -> Any:
        if name == "s":
            return self.s
        return self.index(name) if name in AXES else self.sizes[name]


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Autograd records here, also under a TorchDispatchMode, which excludes its keys while an op runs."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    guard = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)
    with guard, torch.enable_grad():
        yield


def evaluate(e: Expr, scope: Any) -> Any:
    """The value of a formula: a tensor that broadcasts to [B,H,M,N], or a Python number; of a Tuple all its values.

    scope: a Scope, or anything else with dtype, device and value(name) for a formula that loads nothing.
    """
    values: list[Any] = []
    for function, operands, last in _tape(e):
        values.append(function(scope, *[values[i] for i in operands]))
        for i in last:
            values[i] = None
    return values[-1]


def tensor(e: Expr, scope: Scope) -> Tensor:
    """`evaluate`, as a tensor of four dimensions; floats in the scope's dtype."""
    value = evaluate(e, scope)
    if not isinstance(value, Tensor):
        kind = {bool: torch.bool, int: torch.int64}.get(type(value), scope.dtype)
        value = torch.tensor(value, dtype=kind, device=scope.device)
    if value.is_floating_point():
        value = value.to(scope.dtype)
    return value if value.dim() == 4 else value.reshape((1,) * (4 - value.dim()) + value.shape)


@functools.lru_cache(maxsize=1024)
def _tape(e: Expr) -> tuple[tuple[Callable, tuple[int, ...], tuple[int, ...]], ...]:
    """(function, the places of its operands, those of them that are not needed after it), ..."""
    tape: list[tuple[Callable, tuple[int, ...]]] = []
    slots: dict[Expr, int] = {}

    def slot(x: Expr) -> int:
        if x not in slots:
            function, operands = _step(x)
            entry = (function, tuple(slot(a) for a in operands))
            tape.append(entry)
            slots[x] = len(tape) - 1
        return slots[x]

    slot(e)
    users = {i: n for n, (_, operands) in enumerate(tape) for i in operands}
    return tuple((f, operands, tuple(i for i in operands if users[i] == n)) for n, (f, operands) in enumerate(tape))


def _step(x: Expr) -> tuple[Callable, tuple[Expr, ...]]:
    """(function of the scope and the operands' values, the operands) of one node."""
    value = E.constant(x)
    if value is not None:
        return (lambda scope: value), ()
    if isinstance(x, sympy.Symbol):
        return (lambda scope: scope.value(x.name)), ()
    op = E.op_of(x)
    if op == "load":
        return _load_step(*E.operands(x))
    if op in ("le", "eq"):
        compare, *both = E.sides(x)
        more = [E.raised(compare, y) or (y, 0) for y in both]
        compared = functools.partial(_compared, getattr(operator, compare), [n for _, n in more])
        return _unscoped(compared), tuple(y for y, _ in more)
    if op == "where":
        return _where, E.operands(x)
    if op in E.CASTS:
        return functools.partial(_cast, getattr(torch, op)), E.operands(x)
    if op is not None:
        return _unscoped(_function(op)), E.operands(x)
    for form, function in FORMS.items():
        if isinstance(x, form):
            return _unscoped(function), x.args
    raise ValueError(f"cannot evaluate {type(x).__name__} in {x}")


def _unscoped(function: Callable) -> Callable:
    return lambda scope, *values: function(*values)


def _cast(dtype: torch.dtype, scope: Scope, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(dtype)
    return torch.tensor(value, dtype=dtype, device=scope.device)


def _compared(compare: Callable, numbers: Sequence[int], *values: Any) -> Any:
    """Of integers plus numbers, which stop at the greatest there is."""
    return compare(*(x.clamp(max=GREATEST - n) + n if n else x for x, n in zip(values, numbers)))


# Loads


def _load_step(name, *indices: Expr) -> tuple[Callable, tuple[Expr, ...]]:
    names = [x.name if isinstance(x, sympy.Symbol) else None for x in indices]
    positions = [n for n in names if n in AXES]
    if len(positions) == len(indices) == len(set(positions)):
        return functools.partial(_view, name.name, tuple(positions)), ()
    if any(E.mentions(i, E.Q) and E.mentions(i, E.KV) for i in indices) and all(map(moves, indices)):
        return functools.partial(_diagonals, name.name, indices), ()
    return functools.partial(_gather, name.name), indices


@functools.lru_cache(maxsize=1024)
def moves(e: Expr) -> bool:
    """Whether the formula keeps its value when q and kv move together."""
    t = E.index("t")
    return E.substitute(e, {E.Q: E.Q + t, E.KV: E.KV + t}) == e


def _view(name: str, axes: tuple[str, ...], scope: Scope) -> Tensor:
    capture = scope.captures[name]
    outside = any(getattr(scope, a)[1] > size for a, size in zip(axes, capture.shape))
    if outside or (scope.stack > 1 and axes != ("h",)):
        return _gather(name, scope, *[scope.index(a) for a in axes])

    def part(x: Tensor) -> Tensor:
        for dim, axis in enumerate(axes):
            start, stop = getattr(scope, axis)
            x = x.narrow(dim, start, stop - start)
        x = x.permute([axes.index(a) for a in AXES if a in axes])
        for dim, axis in enumerate(AXES):
            if axis not in axes:
                x = x.unsqueeze(dim)
        return x

    return _tapped(name, scope, part(capture), lambda buffer, g: part(buffer).add_(g))


def _gather(name: str, scope: Scope, *indices: Any) -> Tensor:
    inside = _inside(scope.captures[name], indices)
    loaded = scope.captures[name][inside]
    return _tapped(name, scope, loaded, lambda buffer, g: scatter(buffer, inside, g))


def _inside(capture: Tensor, indices: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_clamp(i, size) for i, size in zip(indices, capture.shape))


def scatter(buffer: Tensor, indices: Sequence[Any], g: Tensor) -> None:
    """Adds g to the buffer's elements at `indices`, which broadcast to g's shape."""
    flat: Any = 0
    for i, size in zip(indices, buffer.shape):
        flat = flat * size + i % size
    flat = torch.as_tensor(flat, device=g.device).expand_as(g)
    buffer.view(-1).scatter_add_(0, flat.reshape(-1), g.reshape(-1))


def _diagonals(name: str, formulas: tuple[Expr, ...], scope: Scope) -> Tensor:
    """A load that depends on kv - q: loaded once per diagonal, [..,1,M+N-1], and laid out as [..,M,N].

    Element (i, j) is on diagonal t = (M-1-i) + j, which the last row meets at column t.
    """
    if scope.stack > 1 and any(E.mentions(e, E.B) for e in formulas):
        return _gather(name, scope, *[evaluate(e, scope) for e in formulas])
    (q0, q1), (k0, k1) = scope.q, scope.kv
    M, N = q1 - q0, k1 - k0
    row = scope.at(q=(q1 - 1, q1), kv=(k0, k0 + M + N - 1), stack=1, taps=None)
    inside = _inside(scope.captures[name], [evaluate(e, row) for e in formulas])
    loaded = scope.captures[name][inside].unfold(-1, N, 1).flip(-2).squeeze(-3)

    def add(buffer: Tensor, g: Tensor) -> None:
        # A row that is M longer each time shifts by one where it is cut at M+N-1.
        skewed = torch.nn.functional.pad(g.flip(-2), (0, M)).flatten(-2)[..., :-M]
        scatter(buffer, inside, skewed.unflatten(-1, (M, M + N - 1)).sum(-2, keepdim=True))

    return _tapped(name, scope, loaded, add)


def _tapped(name: str, scope: Scope, loaded: Tensor, add: Callable) -> Tensor:
    if not loaded.is_floating_point():
        return loaded if loaded.dtype == torch.bool else loaded.to(torch.int64)  # fewer bits would wrap around
    loaded = loaded.to(scope.dtype)
    if scope.taps is None or name not in scope.wanted:
        return loaded
    leaf = loaded.detach().requires_grad_()
    scope.taps.append(Tap(name, leaf, add))
    return leaf


def _clamp(i: Any, size: int) -> Any:
    if isinstance(i, Tensor):
        return i.clamp(-size, size - 1)
    return max(-size, min(i, size - 1))


# Operations; a Python number stays one as long as no tensor meets it


def _function(op: str) -> Callable:
    if op in FUNCTIONS:
        return FUNCTIONS[op]
    function = getattr(torch, op, None) or getattr(torch.nn.functional, op, None)
    if function is None:
        raise ValueError(f"no torch function computes {op!r}")
    # A float as precise as it is: without dims it makes no tensor wider.
    return lambda *values: function(
        *[torch.tensor(v, dtype=torch.float64) if type(v) is float else torch.as_tensor(v) for v in values]
    )


def _where(scope: Scope, c: Any, a: Any, b: Any) -> Any:
    if not isinstance(c, Tensor):
        return a if c else b
    a, b = (torch.tensor(x, dtype=torch.float64).to(scope.dtype) if type(x) is float else x for x in (a, b))
    return torch.where(c, a, b)


def _extreme(of_numbers: Callable, of_tensors: Callable) -> Callable:
    """Of equal sides each gets half of the gradient."""

    def extreme(a: Any, b: Any) -> Any:
        for x, y in ((a, b), (b, a)):
            if isinstance(x, Tensor):
                return of_tensors(x, y if isinstance(y, Tensor) else torch.tensor(y, dtype=x.dtype))
        return of_numbers(a, b)

    return extreme


def _clamp_to(of_numbers: Callable, bound: str) -> Callable:
    """A value at the bound keeps its whole gradient."""

    def clamp(a: Any, b: Any) -> Any:
        a = torch.full_like(b, a) if isinstance(b, Tensor) and not isinstance(a, Tensor) else a
        return torch.clamp(a, **{bound: b}) if isinstance(a, Tensor) else of_numbers(a, b)

    return clamp


def _div(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a / b
    return float(torch.tensor(float(a)) / b)


def _to_int(x: Any) -> Any:
    return x.to(torch.int64) if isinstance(x, Tensor) else int(x)


def _not(x: Any) -> Any:
    return x.logical_not() if isinstance(x, Tensor) else not x


def _fold(function: Callable) -> Callable:
    return lambda *values: functools.reduce(function, values)


FUNCTIONS: dict[str, Callable] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": _div,
    "//": operator.floordiv,
    "%": operator.mod,
    "neg": operator.neg,
    "abs": abs,
    "min": _extreme(min, torch.minimum),
    "max": _extreme(max, torch.maximum),
    "clamp_max": _clamp_to(min, "max"),
    "clamp_min": _clamp_to(max, "min"),
    "int": _to_int,
    "fle": operator.le,
    "flt": operator.lt,
    "feq": operator.eq,
}
FORMS: dict[Any, Callable] = {
    sympy.Add: _fold(operator.add),
    sympy.Mul: _fold(operator.mul),
    sympy.Pow: operator.pow,
    sympy.And: _fold(operator.and_),
    sympy.Or: _fold(operator.or_),
    sympy.Not: _not,
    sympy.Tuple: lambda *values: values,
}
