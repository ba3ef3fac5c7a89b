"""What was fused, what was refused and why, in the user's own lines; the graph diff; `explain()`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import fx

from .breaks import Mark, hints_since
from .spec import Match, MoEMatch, Refusal, Site, where_of


@dataclasses.dataclass
class GraphRecord:
    """One graph: what its passes found, how long they took (seconds), and the problem of each site for tuning."""

    sites: list[Site] = dataclasses.field(default_factory=list)
    works: list[Any] = dataclasses.field(default_factory=list)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)
    higher_order: list[str] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    failed: str = ""
    program: fx.GraphModule | None = None
    diff: str = ""

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def keep(self, program: fx.GraphModule, before: list[str]) -> None:
        self.program = program
        self._before = before

    def diff_text(self) -> str:
        if self.program is None:
            return ""
        after = lines_of(self.program.graph)
        lines = difflib.unified_diff(self._before, after, "written", "fused", n=1, lineterm="")
        return "\n".join(line for line in lines if not line.startswith("@@"))


@dataclasses.dataclass
class Report:
    """Everything that backend "tv" compiled while the report was open."""

    records: list[GraphRecord] = dataclasses.field(default_factory=list)
    breaks: dict[str, int] = dataclasses.field(default_factory=dict)
    hints: list[str] = dataclasses.field(default_factory=list)

    @property
    def graphs(self) -> int:
        return len(self.records)

    @property
    def sites(self) -> list[Site]:
        return [s for r in self.records for s in r.sites]

    @property
    def works(self) -> list[Any]:
        return [w for r in self.records for w in r.works]

    @property
    def refusals(self) -> list[Refusal]:
        return [x for r in self.records for x in r.refusals]

    @property
    def graph_modules(self) -> list[fx.GraphModule]:
        return [r.program for r in self.records if r.program is not None]

    @property
    def pass_seconds(self) -> dict[str, float]:
        total: collections.Counter = collections.Counter()
        for r in self.records:
            total.update(r.seconds)
        return dict(total)

    def diff(self) -> str:
        """For each graph, the operations that went and the fused nodes that took their place."""
        return "\n\n".join(text for r in self.records if (text := r.diff_text()))

    def __rich__(self) -> Group:
        return Group(*_sections(self))

    def __str__(self) -> str:
        console = Console(width=120, no_color=True, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def _sections(report: Report) -> Iterator[Any]:
    seconds = sum(report.pass_seconds.values())
    yield Text(f"{report.graphs} graphs, {len(report.sites)} sites fused, {len(report.refusals)} left; {seconds:.2f} s")
    by_text: dict[tuple, list[Site]] = {}
    for site in report.sites:
        by_text.setdefault(dataclasses.astuple(site), []).append(site)
    if by_text:
        table = Table("fused", "", "kernel", title_justify="left", show_lines=True)
        for (spec, where, kernel, *about), sites in by_text.items():
            shapes, cost, configs = about
            body = map(escape, filter(None, (spec, shapes, where, cost, configs)))
            table.add_row(f"{len(sites)}x", "\n".join(body), kernel)
        yield table
    for refusal, count in collections.Counter(report.refusals).items():
        yield Text(f"left as it was{f' ({count}x)' if count > 1 else ''}: {refusal}")
    for name, count in collections.Counter(n for r in report.records for n in r.higher_order).items():
        yield Text(f"higher-order operator left whole: {name} ({count}x)")
    for reason, count in report.breaks.items():
        yield Text(f"graph break ({count}x): {reason}")
    for hint in report.hints:
        yield Text(hint)
    for record in report.records:
        if record.failed:
            yield Text(f"left to Inductor after an internal error: {record.failed}")


_open: list[Report] = []


@contextlib.contextmanager
def collect() -> Iterator[Report]:
    """Collects into a Report everything that backend "tv" compiles in the block."""
    from torch._dynamo.utils import counters

    report = Report()
    before, mark = dict(counters["graph_break"]), Mark.now()
    _open.append(report)
    try:
        yield report
    finally:
        _open.remove(report)
        report.hints = hints_since(mark)
        for reason, count in counters["graph_break"].items():
            if count > before.get(reason, 0):
                report.breaks[reason] = count - before.get(reason, 0)


def explain(fn: Callable | torch.nn.Module, **compile_arguments: Any) -> Callable[..., Report]:
    """explain(model)(*args) compiles and runs the model once and returns the Report.

    compile_arguments: those of torch.compile but `backend`.
    """

    def run(*args: Any, **kwargs: Any) -> Report:
        torch._dynamo.reset()
        with collect() as report:
            torch.compile(fn, backend="tv", **compile_arguments)(*args, **kwargs)
        return report

    return run


def publish(record: GraphRecord, log: str) -> None:
    for report in _open:
        report.records.append(record)
    if log:
        alone = Report([record])
        Console(stderr=True).print(alone.diff() if log == "diff" else alone)


def site_of(match: Match | MoEMatch, kernel: str) -> Site:
    """What a report says of a fused site: shapes, arithmetic and bytes with and without S x S tensors."""
    if isinstance(match, MoEMatch):
        return _moe_site(match, kernel)
    q, k, v = (o.node.meta["val"] for o in (match.q, match.k, match.v))
    shapes = ", ".join(f"{name} {_shape(t)}" for name, t in zip("qkv", (q, k, v)))
    return Site(str(match.spec), where_of(match.anchor), kernel, shapes, _cost(match))


def _moe_site(m: MoEMatch, kernel: str) -> Site:
    """Of a mixture of experts: shapes, and the arithmetic beside that of every expert on every token."""
    top, count, (F, H_out), H = m.top, m.experts, m.down[0].shape[-2:], m.up[0].shape[-2]
    dtype = str(m.x.meta["val"].dtype).removeprefix("torch.")
    shapes = f"{dtype}, T={m.tokens}, E={count}, K={top}, H={H}, F={F}, H_out={H_out}"
    cost = ""
    if m.tokens.is_Integer:
        flops = 2 * int(m.tokens) * top * F * (m.spec.parts * H + H_out)
        cost = f"{flops / 1e9:.3g} GFLOP; {flops * count / top / 1e9:.3g} with every expert on every token"
    return Site(str(m.spec), where_of(m.anchor), kernel, shapes, cost)


def _shape(t: torch.Tensor) -> str:
    dtype = str(t.dtype).removeprefix("torch.")
    return f"{dtype}[{', '.join(map(str, t.shape))}]"


def _cost(match: Match) -> str:
    sizes = {}
    for name, group in zip(("B", "H", "S_q", "D_v"), match.out.groups):
        sizes[name] = [match.out.sizes[a] for a in group]
    sizes["S_kv"], sizes["D"] = ([match.k.sizes[a] for a in match.k.groups[i]] for i in (2, 3))
    if any(not n.is_Integer for group in sizes.values() for n in group):
        return ""
    n = {name: int(torch.Size(int(x) for x in group).numel()) for name, group in sizes.items()}
    scores = n["B"] * n["H"] * n["S_q"] * n["S_kv"]
    width = match.anchor.meta["val"].element_size()
    flops = 2 * scores * (n["D"] + n["D_v"])
    ends = sum(o.node.meta["val"].numel() for o in (match.q, match.k, match.v, match.out)) * width
    steps = sum(isinstance(x.meta.get("val"), torch.Tensor) for x in match.region[:-1])
    written = (scores * steps * width + ends) / 1e6
    return f"{flops / 1e9:.3g} GFLOP; written {written:.3g} MB in S x S steps, fused {ends / 1e6:.3g} MB"


def lines_of(graph: fx.Graph) -> list[str]:
    """One line a node: `p: float32[1, 8, 64, 64] = softmax(x, -1)`."""
    lines = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            lines.append(f"{node.name}: {_value(node)} = {node.op}")
        elif node.op == "output":
            lines.append(f"return {_argument(node.args[0])}")
        else:
            name = getattr(node.target, "_schema", None)
            name = (
                name.name.replace("aten::", "").replace("::", ".")
                if name
                else getattr(node.target, "__name__", node.target)
            )
            args = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
            lines.append(f"{node.name}: {_value(node)} = {name}({', '.join(args)})")
    return lines


def _argument(a: Any) -> str:
    if isinstance(a, (list, tuple)):
        return f"[{', '.join(map(_argument, a))}]"
    return a.name if isinstance(a, fx.Node) else repr(a)


def _value(node: fx.Node) -> str:
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return _shape(val)
    if isinstance(val, (list, tuple)):
        return "(" + ", ".join(_shape(v) if isinstance(v, torch.Tensor) else str(v) for v in val) + ")"
    return str(val)
