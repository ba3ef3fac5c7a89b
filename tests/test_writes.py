"""Random programs that write to views of a temporary give what eager gives, whatever shows the memory later."""

import random

import pytest
import torch

from tvcompile.passes.canonicalize import canonicalize, placeholders_of
from tvcompile.passes.writes import written_arguments

VIEWS = (
    "{a}.view(-1)", "{a}.reshape(2, -1)", "{a}[1:3]", "{a}[..., 1:]", "{a}[0]", "{a}.unsqueeze(0)", "{a}.flatten(0, 1)",
    "{a}.t()", "{a}.transpose(0, 1)", "{a}.detach()", "{a}.view_as({a})", "{a}[None]", "{a}.squeeze(0)", "{a}[::2]",
)  # fmt: skip
WRITES = (
    "{a}.add_(x.sum())", "{a}.mul_(2)", "{a}[0] = 3.0", "{a}.index_add_(0, i[:1], torch.ones_like({a}[:1]))",
    "{a} += {a}.mean()", "{a}[{a} > 4] = 1.5", "{a}.copy_({a} * 0.5)", "{a}[1:] = {a}[:1]", "{a}.clamp_(max=7)",
)  # fmt: skip


def program_of(seed: int) -> str:
    """A function of x [4,6] and i [1]; lines that do not fit their tensor are left out."""
    rng = random.Random(seed)
    scope = {"torch": torch, "x": torch.arange(24.0).view(4, 6), "i": torch.tensor([0])}
    lines = ["b = x * 1.5", "names = [b]"]
    names = ["b"]
    exec("\n".join(lines), scope)
    for k in range(rng.randint(4, 9)):
        a = rng.choice(names)
        kind = rng.choice(("view", "view", "write", "write", "read"))
        if kind == "view":
            line, name = f"v{k} = {rng.choice(VIEWS).format(a=a)}", f"v{k}"
        elif kind == "write":
            line, name = rng.choice(WRITES).format(a=a), None
        else:
            line, name = f"names.append({a} + 0.0)", None
        try:
            exec(line, scope)
        except (RuntimeError, IndexError):
            continue
        lines.append(line)
        names += [name] if name else []
    lines.append(f"return *names, {', '.join(f'{n} * 1.0' for n in names)}")
    return "def program(x, i):\n" + "\n".join(f"    {line}" for line in lines)


def rewritten(program, *inputs):
    """(outputs of the canonical graph, nodes of it that still write)"""
    found = []

    def keep(gm, _):
        graph, _ = canonicalize(gm, placeholders_of(gm), {}, {})
        found.extend(n for n in graph.graph.nodes if written_arguments(n))
        return graph

    torch._dynamo.reset()
    return torch.compile(program, backend=keep, fullgraph=True)(*inputs), found


@pytest.mark.parametrize("seed", range(40))
def test_writes_to_views_of_a_temporary(seed):
    scope = {"torch": torch}
    source = program_of(seed)
    exec(source, scope)
    x, i = torch.randn(4, 6), torch.tensor([0])
    want = scope["program"](x.clone(), i)
    got, _ = rewritten(scope["program"], x.clone(), i)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m: f"{m}\n{source}")


def test_a_flat_view_is_written_functionally():
    def program(x, i):
        out = torch.zeros_like(x)
        flat = out.view(-1, 6)
        for k in range(3):
            flat.index_add_(0, i + k, x[0, :1] * k)
        return out

    x, i = torch.randn(2, 4, 6), torch.tensor([1])
    got, writes = rewritten(program, x, i)
    torch.testing.assert_close(got, program(x, i))
    assert not writes
