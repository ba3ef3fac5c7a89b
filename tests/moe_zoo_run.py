"""Runs the zoo of mixtures of experts and prints the table; see tests/moe_zoo.py."""

from __future__ import annotations

import argparse
import time
import traceback
from collections import Counter

import torch

import tvcompile
from tests.harness import STRICT
from tests.moe_zoo import ENTRIES, FUSABLE, MoeEntry, cases, counts, expected
from tests.zoo_run import INDUCTOR, Case, Result, measure, run, table, to

PRODUCTS = ("grouped_mm", "bmm", "index_add")


def shortfall(case: Case, result: Result) -> str:
    """What is not fused, or "". Where experts break the graph, layers share one, and attention in it is fused."""
    got, want = counts(result.sites), expected(case)
    whole = got == want and result.graphs == 1
    if whole if case.impl in FUSABLE else got[0] > 0 == got[1]:
        return ""
    return f"attention {got[0]} of {want[0]}, experts {got[1]} of {want[1]}, graphs {result.graphs}"


def census(case: Case) -> tuple[int, Counter, list[str]]:
    """Graphs, experts' products in Dynamo's graphs, and hints: what is captured, whatever is lifted."""
    products: Counter = Counter()
    model = case.entry.model(case.impl, case.dtype)
    torch._dynamo.reset()
    with tvcompile.collect() as report:
        compiled = torch.compile(model, backend="tv", options={"tv.codegen": "none"})
        run(model, compiled, to(case.entry.inputs(), case.dtype), case.train)
    for record in report.records:
        graph = record.program.graph if record.program is not None else torch.fx.Graph()
        products.update(p for n in graph.nodes for p in PRODUCTS if p in str(n.target))
    return report.graphs, products, report.hints


def attempt(case: Case, options: argparse.Namespace) -> tuple[str, str]:
    """A line of the table and a one-word verdict."""
    start = time.perf_counter()
    try:
        if options.census:
            graphs, products, hints = census(case)
            text = f"graphs {graphs} products {dict(products)}" + "".join(f"\n    {h}" for h in hints[:1])
            return f"{case!s:44} {text}", "ok" if (graphs == 1) == (case.impl in FUSABLE) else "differs"
        result = measure(case, "tv", INDUCTOR if options.inductor else STRICT)
    except Exception as error:
        if options.verbose:
            traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        return f"{case!s:44} CRASH {type(error).__name__}: {' | '.join(lines[:3])[:400]}", "crash"
    wrong, missing = result.wrong(), shortfall(case, result)
    (a, m), (a_want, m_want) = counts(result.sites), expected(case)
    errors = " ".join(f"{kind} {t:.0e}/{e:.0e}" for kind in ("out", "grad") for t, e in [result.worst(kind)])
    verdict = "wrong" if wrong else "unfused" if missing else "ok"
    counted = f"attention {a}/{a_want} experts {m}/{m_want} graphs {result.graphs}"
    line = f"{case!s:44} {counted} {errors} {time.perf_counter() - start:.1f}s {verdict}"
    shown = wrong if options.verbose else wrong[:2]
    refused = [r for r in result.refusals if missing or options.verbose]
    details = Counter([f"refused {r}" for r in refused] + [f"wrong {w}" for w in shown])
    if options.verbose:
        details.update(f"spec {s}" for s in result.sites)
    return "\n".join([line, *(f"    {n}x {d}" for d, n in details.items())]), verdict


def main(argv: list[str], entries: tuple[MoeEntry, ...] = ENTRIES) -> int:
    """Prints the table; the exit status is 1 if anything is wrong or not fused."""
    return table("tests.moe_zoo", argv, entries, cases, attempt)
