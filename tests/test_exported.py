"""Programs of torch.export, fused: what they mean, their signature, saved, and packaged by AOTInductor."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.testing import assert_close

import tvcompile
from tvcompile import exported
from tvcompile.passes.canonicalize import remove_asserted_types

STRICT = {"tv.strict": True}


class Attention(nn.Module):
    """[B,S,64] -> [B,S,64], causal within documents, with slopes."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.slopes = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, document: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        i = torch.arange(S, device=x.device)
        s = q @ k.mT / 4 + self.slopes[:, None, None] * (i - i[:, None])
        keep = (document[:, :, None] == document[:, None]) & (i <= i[:, None])
        return self.out((s.masked_fill(~keep[:, None], -torch.inf).softmax(-1) @ v).transpose(1, 2).reshape(B, S, -1))


def inputs(B: int, S: int) -> tuple[Tensor, Tensor]:
    return torch.randn(B, S, 64), (torch.arange(S) // 7).expand(B, S).contiguous()


def fused(program: ExportedProgram, count: int) -> ExportedProgram:
    with tvcompile.collect() as report:
        new = exported.fuse(program, STRICT)
    assert len(report.sites) == count, str(report)
    return new


def of_attention() -> tuple[Attention, ExportedProgram]:
    torch.manual_seed(0)
    model, B, S = Attention().eval(), Dim("B", max=8), Dim("S", min=2, max=512)
    return model, export(model, inputs(2, 100), dynamic_shapes=({0: B, 1: S}, {0: B, 1: S}))


SIZES = [(2, 100), (1, 2), (3, 77), (8, 512)]


@pytest.mark.parametrize("saved", [False, True])
def test_the_program_is_right_at_every_size_and_can_be_saved(saved):
    model, program = of_attention()
    new = fused(program, 1)
    assert new.range_constraints == program.range_constraints
    if saved:
        file = io.BytesIO()
        torch.export.save(new, file)
        file.seek(0)
        new = torch.export.load(file)
    for size in SIZES:
        x = inputs(*size)
        assert_close(new.module()(*x), model(*x))
    with pytest.raises((RuntimeError, AssertionError)):
        new.module()(*inputs(9, 4))


def test_decomposed_and_trained():
    model, program = of_attention()
    x = inputs(2, 100)
    assert_close(fused(program, 1).run_decompositions().module()(*x), model(*x))
    other = fused(program, 1).module()
    for m in (model, other):
        m(*x).square().sum().backward()
    found = dict(other.named_parameters())
    for name, p in model.named_parameters():
        assert_close(found[name].grad, p.grad, atol=1e-4, rtol=1e-4)


def test_an_attention_package_is_right_at_every_size(tmp_path):
    model, program = of_attention()
    path = exported.package(program, str(tmp_path / "model.pt2"), STRICT)
    packed = torch._inductor.aoti_load_package(path)
    for size in SIZES:
        x = inputs(*size)
        assert_close(packed(*x), model(*x))


class Experts(nn.Module):
    """{"y": [T,32], "aux": the loss of the balance}; experts without a bias, so that lists are empty."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(32, 4)
        self.up = nn.ModuleList(nn.Linear(32, 48, bias=False) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(48, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        p = self.router(x).softmax(-1)
        w, ids = p.topk(2)
        y = torch.zeros_like(x)
        for e in range(4):
            token, k = torch.where(ids == e)
            y.index_add_(0, token, self.down[e](F.silu(self.up[e](x[token]))) * w[token, k, None])
        return {"y": y, "aux": p.mean(0).square().sum()}


def test_a_package_of_experts_is_right_at_every_size(tmp_path):
    torch.manual_seed(0)
    model = Experts().eval()
    program = export(model, (torch.randn(30, 32),), dynamic_shapes=({0: Dim("T", min=2, max=400)},), strict=False)
    new = fused(program, 1)
    packed = torch._inductor.aoti_load_package(exported.package(program, str(tmp_path / "model.pt2"), STRICT))
    for T in (2, 30, 399):
        x = torch.randn(T, 32)
        want = model(x)
        assert_close(new.module()(x), want)
        assert_close(packed(x), want)


class Cached(nn.Module):
    """Writes K and V into buffers, and counts."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        for name in ("k", "v"):
            self.register_buffer(name, torch.zeros(1, 2, 64, 16))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        at = self.seen + torch.arange(x.shape[1])
        self.k.index_copy_(2, at, k)
        self.v.index_copy_(2, at, v)
        keep = torch.arange(64) <= at[:, None]
        out = F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=keep)
        self.seen.add_(x.shape[1])
        return out


class Wrapped(nn.Module):
    """Contexts that torch.export makes bodies of."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mask = torch.ones(33, 33).tril().log()
            fixed = ((q @ k.mT / 4 + mask).softmax(-1) @ v) * 2
        with torch.autocast("cpu", torch.bfloat16):
            half = q @ k.mT / 4
        return fixed * q, (half.float() + mask).softmax(-1) @ v


class Constants(nn.Module):
    """Arguments that are no tensors, one that is given back, and None."""

    def forward(self, q: Tensor, scale: float, shifted: bool, mask: Tensor | None = None, other: None = None):
        s = q @ q.mT * scale
        if shifted:
            s = s + torch.arange(q.shape[2]) * 0.01
        if mask is not None:
            s = s.masked_fill(mask, -1e9)
        return {"out": s.softmax(-1) @ q, "q": q, "other": other}


def test_buffers_are_written():
    model = Cached().eval()
    new = fused(export(copy.deepcopy(model), (torch.randn(1, 4, 32),)), 1).module()
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(1, 4, 32)
            assert_close(new(x), model(x))
    assert_close(dict(new.named_buffers()), dict(model.named_buffers()))


def test_contexts_keep_their_meaning():
    q, k, v = (torch.randn(2, 4, 33, 16, requires_grad=True) for _ in range(3))
    new = fused(export(Wrapped(), (q, k, v)), 2).module()
    got, want = new(q, k, v), Wrapped()(q, k, v)
    assert_close(got, want, atol=0.03, rtol=0.03)
    for i in (0, 1):
        grads = [torch.autograd.grad(out[i].sum(), (q, k, v), allow_unused=True) for out in (got, want)]
        assert_close(*grads, atol=0.06, rtol=0.06)
    assert grads[0][0] is not None
    assert torch.autograd.grad(new(q, k, v)[0].sum(), (k, v), allow_unused=True) == (None, None)


def test_what_is_asserted_of_types_is_dropped_where_it_is_so():
    """Elsewhere it stays, to fail when the program runs."""
    graph, assertion = torch.fx.Graph(), torch.ops.aten._assert_tensor_metadata.default
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(2)
    for right in ({"dtype": torch.float32, "device": x.meta["val"].device}, {"layout": torch.strided}):
        graph.call_function(assertion, (x,), right)
    wrong = graph.call_function(assertion, (x,), {"dtype": torch.bfloat16})
    sized = graph.call_function(assertion, (x, [2], None, torch.float32))
    remove_asserted_types(graph)
    assert graph.find_nodes(op="call_function", target=assertion) == [wrong, sized]


def test_arguments_that_are_no_tensors():
    q, mask = torch.randn(2, 4, 33, 16), torch.rand(33, 33) < 0.3
    new = fused(export(Constants(), (q, 0.25, True), {"mask": mask}), 1).module()
    assert_close(new(q * 2, 0.25, True, mask=~mask), Constants()(q * 2, 0.25, True, mask=~mask))


def test_a_program_without_attention_is_itself():
    program = export(nn.Linear(3, 4), (torch.randn(2, 3),))
    assert fused(program, 0) is program


def test_grouped_experts_of_a_model():
    transformers = pytest.importorskip("transformers", reason="no transformers")
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=64,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    ids = [torch.randint(0, 64, (2, 20)) for _ in range(2)]
    with torch.no_grad():
        program = export(model, (), {"input_ids": ids[0], "use_cache": False}, strict=False)
        new = fused(program, 4).module()
        for x in ids:
            assert_close(new(input_ids=x, use_cache=False).logits, model(input_ids=x, use_cache=False).logits)


def test_an_error_of_ours_leaves_the_program(monkeypatch):
    _, program = of_attention()
    monkeypatch.setattr("tvcompile.backend.rewrite", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="division by zero"):
        assert exported.fuse(program) is program
    with pytest.raises(ZeroDivisionError):
        exported.fuse(program, STRICT)


def test_a_package_that_cannot_be_made_fused_is_made_without(monkeypatch, tmp_path):
    model, program = of_attention()
    made, whole = [], torch._inductor.aoti_compile_and_package

    def refuse(given, **how):
        made.append(given)
        if given is not program:
            raise NotImplementedError("an op of tv")
        return whole(given, **how)

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", refuse)
    with pytest.raises(NotImplementedError):
        exported.package(program, str(tmp_path / "model.pt2"), STRICT)
    with pytest.warns(UserWarning, match="an op of tv"):
        path = exported.package(program, str(tmp_path / "model.pt2"))
    assert made[-1] is program and len(made) == 3
    x = inputs(3, 77)
    assert_close(torch._inductor.aoti_load_package(path)(*x), model(*x))


def test_what_is_given_wrongly_is_told():
    _, program = of_attention()
    with pytest.raises(TypeError, match="expected an ExportedProgram, got Attention: torch.export.export"):
        exported.fuse(Attention())
    with pytest.raises(ValueError, match=r"ends in .pt2, got 'model.zip'"):
        exported.package(program, "model.zip")
    with pytest.raises(ValueError, match="unknown option tv.strickt"):
        exported.fuse(program, {"tv.strickt": True})
