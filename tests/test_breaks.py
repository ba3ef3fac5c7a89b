"""Loops over experts that break the graph: the report names the line and what to write instead."""

import re

import pytest
import torch

import tvcompile
from tvcompile import breaks

OPTIONS = {"tv.codegen": "none"}


def over_hit_experts(x, ids, w, up, down):
    out = torch.zeros_like(x)
    mask = torch.nn.functional.one_hot(ids, 4).permute(2, 1, 0)
    for e in mask.sum((-1, -2)).nonzero():
        e = e[0]
        k, t = torch.where(mask[e])
        out.index_add_(0, t, (x[t] @ up[e]).relu() @ down[e] * w[t, k, None])
    return out


def if_any(x, ids, w, up, down):
    out = torch.zeros_like(x)
    for expert in range(4):
        mask = (ids == expert).any(-1)
        if mask.any():
            out[mask] += (x[mask] @ up[expert]).relu() @ down[expert] * w[mask].sum(-1, keepdim=True)
    return out


def named_shortly(x, ids, w, up, down):
    out, f = torch.zeros_like(x), [lambda r, e=e: (r @ up[e]).relu() @ down[e] for e in range(4)]
    for e in range(4):
        m = (ids == e).any(-1)
        if m.any():
            out[m] += f[e](x[m]) * w[m].sum(-1, keepdim=True)
    return out


def if_numel(x, ids, w, up, down):
    out = torch.zeros_like(x)
    for e in range(4):
        t, k = torch.where(ids == e)
        if t.numel() == 0:
            continue
        out.index_add_(0, t, (x[t] @ up[e]).relu() @ down[e] * w[t, k, None])
    return out


def by_sizes(x, ids, w, up, down):
    order = ids.flatten().argsort()
    sizes = (ids.flatten()[:, None] == torch.arange(4)).sum(0).tolist()
    rows = x[order // 2].split(sizes)
    y = torch.cat([(r @ up[e]).relu() @ down[e] for e, r in enumerate(rows)])
    return torch.zeros_like(x).index_add_(0, order // 2, y * w.flatten()[order, None])


def over_unique_ids(x, ids, w, up, down):
    out = torch.zeros_like(x)
    for e in torch.unique(ids).tolist():
        t, k = torch.where(ids == e)
        out.index_add_(0, t, (x[t] @ up[e]).relu() @ down[e] * w[t, k, None])
    return out


def by_the_most(x, ids, w, up, down):
    hits = torch.nn.functional.one_hot(ids.flatten(), 4)
    most = int(hits.sum(0).max())
    sent = torch.nn.functional.one_hot((hits.cumsum(0) - 1).clamp(0, most - 1), most) * hits[..., None]
    sent = sent.view(len(x), 2, 4, most).to(x.dtype)
    y = torch.einsum("tkec,th->ech", sent, x).bmm(up).relu().bmm(down)
    return torch.einsum("tkec,ech,tk->th", sent, y, w)


class IfInAModule(torch.nn.Module):
    """The loop over the module's experts breaks nothing: only the test in it does."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, ids, w, up, down):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if len(t) > 0:
                out.index_add_(0, t, expert(x[t]).relu() * w[t, k, None])
        return out


def sums(x, *_):
    for _ in range(3):
        if x.sum() > 0:
            x = x - 1
    return x


def no_rows(x, *_):
    for i in range(3):
        if x.dim() == i:
            if x.any():
                x = torch.sin(x)
    return x


def no_number(x, *_):
    for i in range(3):
        if x.any():
            x = torch.sin(x[i:])
    return x


def tensors():
    torch.manual_seed(0)
    up, down = torch.randn(4, 8, 16), torch.randn(4, 16, 8)
    return torch.randn(6, 8), torch.randint(0, 4, (6, 2)), torch.rand(6, 2), up, down


def report_of(program, *inputs):
    with tvcompile.collect() as report:
        torch.compile(program, backend="tv", options=OPTIONS)(*inputs)
    return report


@pytest.mark.parametrize(
    "program, code, rewrite",
    [
        (over_hit_experts, "for e in mask.sum((-1, -2)).nonzero():", "for e in range(E)"),
        (if_any, "if mask.any():", "leave the test out"),
        (named_shortly, "if m.any():", "leave the test out"),
        (if_numel, "if t.numel() == 0:", "leave the test out"),
        (by_sizes, ".sum(0).tolist()", "torch._grouped_mm with offsets"),
        (over_unique_ids, "for e in torch.unique(ids).tolist():", "for e in range(E)"),
        (by_the_most, "most = int(hits.sum(0).max())", "as many places as there are tokens"),
        (IfInAModule(), "if len(t) > 0:", "leave the test out"),
    ],
)
def test_a_loop_over_experts_is_named_with_its_rewrite(program, code, rewrite):
    report = report_of(program, *tensors())
    assert len(report.hints) == 1, report.hints
    assert "test_breaks.py:" in report.hints[0] and code in report.hints[0] and rewrite in report.hints[0]
    assert report.hints[0] in str(report).replace("\n", " ") or code in str(report)


@pytest.mark.parametrize("program", [sums, no_rows, no_number])
def test_other_breaks_get_no_such_hint(program, monkeypatch):
    assert not report_of(program, *tensors()).hints
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # what was reported once is not reported again
    monkeypatch.setattr(breaks, "EXPERTS", re.compile(""))
    assert report_of(program, *tensors()).hints, "it breaks where a loop over experts would"


def test_a_second_report_does_not_repeat_the_first():
    report_of(over_hit_experts, *tensors())
    assert not report_of(torch.sin, torch.ones(3)).hints


def test_a_model_of_transformers_is_told_its_switch():
    pytest.importorskip("transformers")
    from tests.moe_zoo import BY_NAME

    model = BY_NAME["mixtral"].model("eager").eval()
    with torch.no_grad():
        report = report_of(model, BY_NAME["mixtral"].inputs()["input_ids"])
    assert report.hints and all("set_experts_implementation('grouped_mm')" in hint for hint in report.hints)
    assert "modeling_mixtral.py" in report.hints[0] and "for expert_idx in expert_hit:" in report.hints[0]


def first_rows_of_each(x, ids):
    """What Inductor cannot differentiate: of what a mask chose, at most four rows."""
    out = torch.zeros_like(x)
    for e in range(2):
        (row,) = torch.where(ids == e)
        out = out.index_add(0, row[:4], x[row[:4]].tanh() * (e + 1))
    return out


@pytest.mark.parametrize("options", [{}, {"tv.strict": True}])
def test_sizes_from_data_that_inductor_cannot_compile_break_the_graph_not_the_program(options):
    x, ids = torch.randn(12, 8, requires_grad=True), torch.arange(12) % 2
    torch._dynamo.reset()
    compiled = torch.compile(first_rows_of_each, backend="tv", options=options)
    got, want = compiled(x, ids), first_rows_of_each(x, ids)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (got, want)))
