"""One way to judge a compiled program: against float64, with eager's own error as the yardstick.

`run` compiles a program with the backend, strict and without code generation, and compares outputs,
gradients and mutated inputs; `tolerated` is the only tolerance of the tests.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SLACK = 1e-5
FEW = 16  # elements below which one error says little about the level of errors
# Where all cases take too long, one run takes a part of them; every TV_TURN gives another.
TURN = int(os.environ.get("TV_TURN", "0"))
STRICT = {"tv.strict": True, "tv.codegen": "none"}
VIEWS = frozenset(
    "view reshape _unsafe_view unsqueeze squeeze expand expand_as slice select permute transpose "
    "alias detach movedim unflatten flatten t mT view_as broadcast_to".split()
)


@dataclass
class Observed:
    """What a program did: its outputs, the gradients, and its inputs afterwards."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def cast(program: Any, dtype: torch.dtype | None) -> Any:
    """A private copy of a module, in `dtype` if given; a function is its own copy."""
    if isinstance(program, torch.nn.Module):
        return copy.deepcopy(program).to(dtype)
    return program


def fresh(x: Any, dtype: torch.dtype | None, train: bool) -> Any:
    """A leaf with the values of `x`, in `dtype` if it is a float."""
    if not isinstance(x, torch.Tensor):
        return x
    wanted = dtype if dtype is not None and x.is_floating_point() else x.dtype
    return x.detach().clone().to(wanted).requires_grad_(train and x.requires_grad)


def leaves(out: Any) -> list[torch.Tensor]:
    """The tensors of a nested result, in order."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        out = list(out.values())
    return [t for part in out or () for t in leaves(part)] if isinstance(out, (list, tuple)) else []


def observe(call: Callable, program: Any, inputs: Sequence[Any], train: bool) -> Observed:
    """Run `call` on `inputs`; in training, backpropagate a fixed random direction."""
    seen = Observed()
    with torch.set_grad_enabled(train):
        outs = leaves(call(*inputs))
        for i, out in enumerate(outs):
            seen.tensors[f"out{i}"] = out.detach()
    wanted = {f"input{i}": x for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)}
    for name, x in wanted.items():
        if x.is_floating_point() and not x.requires_grad:
            seen.tensors[f"{name} afterwards"] = x.detach()
    if isinstance(program, torch.nn.Module):
        wanted |= dict(program.named_parameters())
    sources = {n: x for n, x in wanted.items() if train and x.requires_grad}
    grads = backpropagate([o for o in outs if o.requires_grad], list(sources.values()))
    seen.tensors |= {f"grad of {n}": g for n, g in zip(sources, grads)}
    return seen


def backpropagate(outs: list[torch.Tensor], sources: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of sum(out * direction); zeros where nothing flows."""
    if not outs or not sources:
        return []
    gen = torch.Generator().manual_seed(7)
    directions = [torch.randn(o.shape, generator=gen).to(o.dtype) for o in outs]
    grads = torch.autograd.grad(outs, sources, directions, allow_unused=True)
    return [torch.zeros_like(s) if g is None else g for s, g in zip(sources, grads)]


def tolerated(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, around=0.0, level=0.0) -> str:
    """'' if `got` is at most twice as far from `exact` as `eager` is, else what is wrong.

    Errors are relative to the largest value of `exact`. Rounding of the program's largest value,
    `around`, is allowed everywhere: the gradient of a key's bias is zero but for rounding. The error of
    a few numbers is one draw and no yardstick: there it counts twice, and eager's relative error elsewhere,
    `level`, counts too.
    Non-finite values must agree with eager's.
    """
    if got.shape != eager.shape or got.dtype != eager.dtype:
        return f"{got.dtype}{list(got.shape)} instead of {eager.dtype}{list(eager.shape)}"
    if not got.is_floating_point():
        return "" if torch.equal(got, eager) else "integers differ"
    if not torch.equal(got.isnan(), eager.isnan()):
        return f"NaN at {int(got.isnan().sum())} places, eager at {int(eager.isnan().sum())}"
    rounding = 4 * torch.finfo(got.dtype).eps * around
    got, eager, exact = got.double(), eager.double(), exact.double()
    finite = eager.isfinite() & exact.isfinite()
    if not torch.equal(got.isfinite(), eager.isfinite()):
        return "infinities differ from eager's"
    if not bool(finite.any()):
        return ""
    got, eager, exact = got[finite], eager[finite], exact[finite]
    size = float(exact.abs().max().clamp_min(1e-30))
    own = float((eager - exact).abs().max())
    own = 2 * max(own, level * size) if got.numel() < FEW else own
    error = float((got - exact).abs().max())
    if error <= 2 * own + SLACK * size + rounding:
        return ""
    return f"error {error / size:.3g}, eager's own {own / size:.3g} (of {size:.3g})"


def relative(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of x over the largest value of `exact`, where both are finite."""
    if not x.is_floating_point() or x.shape != exact.shape:
        return 0.0
    known = x.isfinite() & exact.isfinite()
    return largest((x.double() - exact.double())[known]) / max(largest(exact[known]), 1e-30)


def largest(x: torch.Tensor) -> float:
    """The largest finite magnitude of a float tensor."""
    finite = x[x.isfinite()] if x.is_floating_point() else x[:0]
    return float(finite.abs().max()) if finite.numel() else 0.0


def reference(program: Any, inputs: Sequence[Any], train: bool, dtype=None) -> Observed:
    """Eager, in `dtype` if given. SDPA takes its exact math path: its CPU flash backward is wrong
    in rows with nothing to attend."""
    program = program if dtype is None else cast(program, dtype)
    with sdpa_kernel(SDPBackend.MATH):
        return observe(program, program, [fresh(x, dtype, train) for x in inputs], train)


def compiled(program: Any, inputs: Sequence[Any], train: bool, backend="tv", dynamic=None):
    """(Observed, Report) of the program compiled alone in a clean Dynamo."""
    torch._dynamo.reset()
    inputs = [fresh(x, None, train) for x in inputs]
    if backend != "tv":
        call = torch.compile(program, backend=backend, fullgraph=True, dynamic=dynamic)
        return observe(call, program, inputs, train), None
    import tvcompile

    call = torch.compile(program, backend="tv", options=STRICT, fullgraph=True, dynamic=dynamic)
    with tvcompile.collect() as report:
        return observe(call, program, inputs, train), report


def differences(got: Observed, eager: Observed, exact: Observed) -> list[str]:
    """Every tensor that is not tolerated, one line each."""
    if got.tensors.keys() != eager.tensors.keys():
        return [f"results {sorted(got.tensors)} instead of {sorted(eager.tensors)}"]
    around = max([0.0, *(largest(t) for t in exact.tensors.values())])
    level = max([0.0, *(relative(eager.tensors[n], exact.tensors[n]) for n in got.tensors)])
    verdicts = {n: tolerated(t, eager.tensors[n], exact.tensors[n], around, level) for n, t in got.tensors.items()}
    return [f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict]


def judge(program: Any, inputs: Sequence[Any], train: bool, backend: str = "tv", dynamic=None):
    """(what is wrong, Report or None) of the compiled program."""
    exact = reference(program, inputs, train, torch.float64)
    eager = reference(program, inputs, train)
    got, report = compiled(cast(program, None), inputs, train, backend, dynamic)
    wrong = differences(got, eager, exact)
    if wrong and report is not None and not report.sites:
        # Nothing was fused: what ran is PyTorch's own, its flash SDPA for one.
        own = observe(program, program, [fresh(x, None, train) for x in inputs], train)
        wrong = differences(got, own, exact)
    return wrong, report


def run(program: Any, inputs: Sequence[Any], train: bool, backend: str = "tv", dynamic=None):
    """Report of the compiled program (None for another backend); AssertionError if it is wrong."""
    wrong, report = judge(program, inputs, train, backend, dynamic)
    assert not wrong, "; ".join(wrong)
    return report


def attention_nodes(report: Any) -> list[torch.fx.Node]:
    """The fused sites' nodes in the emitted graphs."""
    return nodes_of(report, torch.ops.tv.attention.default)


def nodes_of(report: Any, target: Any) -> list[torch.fx.Node]:
    graphs = [gm.graph for gm in report.graph_modules]
    return [n for g in graphs for n in g.find_nodes(op="call_function", target=target)]


def all_nodes(report: Any) -> list[torch.fx.Node]:
    return [n for gm in report.graph_modules for n in gm.graph.nodes]


def square_nodes(report: Any, rows: int, columns: int) -> list[str]:
    """Nodes with an S_q and an S_kv dim, except inputs that come in so and views of them."""
    found = []
    for gm in report.graph_modules:
        given: set[torch.fx.Node] = set()
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            values = value if isinstance(value, (tuple, list)) else (value,)
            if not any(is_square(v, rows, columns) for v in values):
                continue
            view = getattr(node.target, "_opname", None) in VIEWS
            if node.op in ("placeholder", "get_attr") or (view and node.all_input_nodes[0] in given):
                given.add(node)
            elif node.op != "output":
                found.append(f"{node.name}: {node.target} {[list(v.shape) for v in values]}")
    return found


def is_square(value: Any, rows: int, columns: int) -> bool:
    """Whether one dim is S_q and another is S_kv."""
    if not isinstance(value, torch.Tensor):
        return False
    shape = [int(d) for d in value.shape]
    return rows in shape and columns in (shape[: (i := shape.index(rows))] + shape[i + 1 :])
