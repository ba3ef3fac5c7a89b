"""Runs a zoo entry three ways (float64 eager, eager, compiled) and compares; see tests/zoo.py."""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from tests.harness import SLACK, STRICT
from tests.zoo_entry import Entry

ANCHORS = ("softmax", "scaled_dot_product")
OUTPUTS = ("logits", "last_hidden_state", "pooler_output")
INDUCTOR = {"tv.strict": True}


class InFloat64(TorchFunctionMode):
    """Reads every request for float32 as one for float64: the reference is wide throughout."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)

    def __enter__(self):
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exception):
        torch.set_default_dtype(torch.float32)
        return super().__exit__(*exception)


@dataclass(frozen=True)
class Case:
    """One way to run one entry."""

    entry: Entry
    impl: str = "eager"
    pad: str = ""
    train: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        mode = "train" if self.train else "infer"
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{self.entry.name}-{self.impl}-{self.pad or 'nopad'}-{mode}-{dtype}"


@dataclass
class Result:
    """What the compiler reported, and relative errors per tensor (output or gradient by name)."""

    case: Case
    graphs: int = 0
    sites: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # name -> (tv, eager)
    nan_differs: list[str] = field(default_factory=list)

    def worst(self, kind: str) -> tuple[float, float]:
        """The largest error (tv, eager) among "out" or "grad" tensors."""
        pairs = [pair for name, pair in self.errors.items() if name.startswith(kind)]
        return max((t for t, _ in pairs), default=0.0), max((e for _, e in pairs), default=0.0)

    def wrong(self) -> list[str]:
        """Tensors whose NaNs are elsewhere, or whose error is above twice eager's own (+1e-5).

        A gradient is allowed at least twice eager's median one: one lucky tensor is no bar.
        """
        grads = sorted(e for name, (_, e) in self.errors.items() if name.startswith("grad"))
        typical = grads[len(grads) // 2] if grads else 0.0
        bad = [f"{name}: NaN differs" for name in self.nan_differs]
        for name, (tv, eager) in self.errors.items():
            allowed = 2 * (max(eager, typical) if name.startswith("grad") else eager) + SLACK
            if not tv <= allowed:
                bad.append(f"{name}: tv {tv:.2e} eager {eager:.2e}")
        return bad


def run(model: torch.nn.Module, forward: Any, inputs: dict, train: bool) -> dict[str, torch.Tensor]:
    """Outputs and, in training, the gradient of every parameter, from a loss over all positions."""
    model.train(train)
    model.zero_grad(set_to_none=True)
    if not train:
        with torch.no_grad():
            return _outputs(forward(**inputs))
    outputs = _outputs(forward(**inputs, **_no_cache(model)))
    rng = np.random.default_rng(3)  # NumPy's: the same numbers whatever the default dtype is
    directions = [torch.from_numpy(rng.standard_normal(o.shape)) for o in outputs.values()]
    sum((o.double() * d).sum() for o, d in zip(outputs.values(), directions)).backward()
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: o.detach() for name, o in outputs.items()}, **grads}


def _outputs(result: Any) -> dict[str, torch.Tensor]:
    found = {f"out {name}": result[name] for name in OUTPUTS if result.get(name) is not None}
    assert found, f"no output among {list(result)}"
    return found


def _no_cache(model: torch.nn.Module) -> dict[str, bool]:
    # Inference keeps each class's default, so that both call styles are seen.
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


def reference(case: Case, model: torch.nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """The same weights and inputs in float64, every internal upcast included."""
    wide = copy.deepcopy(model).double()
    if wide._can_set_experts_implementation():
        wide.set_experts_implementation("eager")  # the grouped product takes no float64
    # SDPA's exact path: its fused CPU backward is wrong in rows with nothing to attend.
    with InFloat64(), sdpa_kernel(SDPBackend.MATH):
        return run(wide, wide, to(inputs, torch.float64), case.train)


def to(inputs: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def measure(case: Case, backend: Any = "tv", options: dict | None = None) -> Result:
    """Compiles the case with `backend` and compares it with eager and with float64 eager."""
    model = case.entry.model(case.impl, case.dtype)
    inputs = to(case.entry.inputs(pad=case.pad), case.dtype)
    exact = reference(case, model, inputs)
    with sdpa_kernel(SDPBackend.MATH):
        eager = run(model, model, inputs, case.train)
    result = Result(case)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, options=options)
    if backend == "tv":
        import tvcompile

        with tvcompile.collect() as report:
            ours = run(model, compiled, inputs, case.train)
        result.graphs = report.graphs
        result.sites = [site.spec for site in report.sites]
        result.refusals = [f"{r.anchor}: {r.reason} ({r.where})" for r in report.refusals]
    else:
        ours = run(model, compiled, inputs, case.train)
    _compare(result, exact, eager, ours)
    torch._dynamo.reset()
    gc.collect()
    return result


def _compare(result: Result, exact: dict, eager: dict, ours: dict) -> None:
    assert exact.keys() == eager.keys() == ours.keys(), exact.keys() ^ ours.keys()
    # Some gradients are zero by symmetry (a bias on keys); noise there has no scale of its own.
    largest = max(
        (x.abs().nan_to_num().max().item() for n, x in exact.items() if "grad" in n and x.numel()),
        default=0,
    )
    for name, x in exact.items():
        known = ~eager[name].isnan()
        if not torch.equal(known, ~ours[name].isnan()):
            result.nan_differs.append(name)
        known &= ~x.isnan()
        size = x[known].abs().max().item() if known.any() else 0.0
        size += 1e-2 * largest if name.startswith("grad") else 0.0
        error = [(y.double() - x)[known].abs().max().item() if known.any() else 0.0 for y in (ours[name], eager[name])]
        result.errors[name] = tuple(e / size if size else e for e in error)


def census(case: Case) -> tuple[int, Counter, list[str]]:
    """Graphs, anchor counts in pre-dispatch ATen, and graph breaks: what Dynamo alone captures."""
    anchors: Counter = Counter()
    graphs = 0

    def backend(gm, example_inputs):
        nonlocal graphs
        graphs += 1
        fakes = [
            node.meta["example_value"] if "example_value" in node.meta else node.meta["val"]
            for node in gm.graph.find_nodes(op="placeholder")
        ]
        mode = torch._guards.TracingContext.get().fake_mode
        with mode, torch.fx.traceback.preserve_node_meta():
            graph = make_fx(
                torch.fx.Interpreter(gm).run,
                pre_dispatch=True,
                tracing_mode="symbolic",
                _allow_non_fake_inputs=True,
            )(*fakes).graph
        anchors.update(str(n.target) for n in graph.nodes if any(a in str(n.target) for a in ANCHORS))
        return gm.forward

    model = case.entry.model(case.impl, case.dtype)
    inputs = to(case.entry.inputs(pad=case.pad), case.dtype)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(model, torch.compile(model, backend=backend), inputs, case.train)
    breaks = [str(reason) for reason in torch._dynamo.utils.counters["graph_break"]]
    torch._dynamo.reset()
    return graphs, anchors, breaks


def cases(entry: Entry, full: bool) -> list[Case]:
    """The full cross of an entry, or per implementation a plain and a padded training case."""
    found = []
    for impl in entry.impls:
        if full:
            cross = itertools.product(entry.pads, (False, True), (torch.float32, torch.bfloat16))
            found += [Case(entry, impl, *how) for how in cross]
        else:
            found += [Case(entry, impl), Case(entry, impl, entry.pads[1 % len(entry.pads)], True)]
    return found


def main(argv: list[str], entries: tuple[Entry, ...]) -> int:
    """Prints the table; the exit status is 1 if anything is wrong or not fused."""
    return table("tests.zoo", argv, entries, cases, attempt)


def table(module: str, argv: list[str], entries: Sequence[Any], cases: Callable, attempt: Callable) -> int:
    """Prints a line for every case of the entries that the arguments name; 1 unless all are "ok"."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("names", nargs="*")
    for flag in ("full", "inductor", "census", "verbose"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--case", help="only cases whose id contains this")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    chosen = [e for e in entries if not options.names or e.name in options.names]
    todo = [c for e in chosen for c in cases(e, options.full) if (options.case or "") in str(c)]
    tally: Counter = Counter()
    for case in todo:
        line, verdict = attempt(case, options)
        tally[verdict] += 1
        print(line, flush=True)
    print(f"{len(todo)} cases of {len(chosen)} classes: {dict(tally)}")
    return int(tally.keys() != {"ok"})


def attempt(case: Case, options: argparse.Namespace) -> tuple[str, str]:
    """A line of the table and a one-word verdict."""
    want = case.entry.sites
    start = time.perf_counter()
    try:
        if options.census:
            graphs, anchors, breaks = census(case)
            good = graphs == 1 and sum(anchors.values()) == want
            text = f"sites {want} anchors {dict(anchors)} graphs {graphs} breaks {breaks}"
            return f"{case!s:44} {text}", "ok" if good else "differs"
        result = measure(case, "tv", INDUCTOR if options.inductor else STRICT)
    except Exception as error:
        if options.verbose:
            traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        return f"{case!s:44} CRASH {type(error).__name__}: {' | '.join(lines[:3])[:400]}", "crash"
    verdict = verdict_of(result)
    errors = " ".join(f"{kind} {t:.0e}/{e:.0e}" for kind in ("out", "grad") for t, e in [result.worst(kind)])
    seconds = time.perf_counter() - start
    counts = f"sites {want} fused {len(result.sites)} graphs {result.graphs}"
    line = f"{case!s:44} {counts} {errors} {seconds:.1f}s {verdict}"
    wrong = result.wrong()
    shown = wrong if options.verbose else [*wrong[:2], *([f"{len(wrong)} tensors"] * bool(wrong))]
    details = Counter([f"refused {r}" for r in result.refusals] + [f"wrong {w}" for w in shown])
    if options.verbose:
        details.update(f"spec {s}" for s in result.sites)
    return "\n".join([line, *(f"    {n}x {d}" for d, n in details.items())]), verdict


def verdict_of(result: Result) -> str:
    if result.wrong():
        return "wrong"
    return "ok" if len(result.sites) == result.case.entry.fusable else "unfused"
