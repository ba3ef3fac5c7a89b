"""The backend as a user meets it: shapes that change, autocast, checkpointing, options, failures, caches."""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tvcompile
from tvcompile import backend
from tvcompile.passes import LIFTS

STRICT = {"tv.strict": True}
NO_CODEGEN = {**STRICT, "tv.codegen": "none"}


def causal(q, k, v):
    i = torch.arange(q.shape[2])
    s = (q @ k.mT) * q.shape[-1] ** -0.5
    return s.masked_fill(i[None] > i[:, None], float("-inf")).softmax(-1) @ v


def qkv(S=24, B=2, H=4, D=16, **kw):
    g = torch.Generator().manual_seed(S)
    return [torch.randn(B, H, S, D, generator=g, **kw) for _ in range(3)]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def test_one_graph_serves_every_length():
    compiled = torch.compile(causal, backend="tv", options=STRICT, dynamic=True)
    with tvcompile.collect() as report:
        for S in (24, 40, 33, 57):
            torch.testing.assert_close(compiled(*qkv(S)), causal(*qkv(S)))
    assert report.graphs == 1 and [s.spec for s in report.sites] == ["scale=0.25; keep = kv <= q"]


def test_automatic_dynamic_compiles_twice_at_most():
    compiled = torch.compile(causal, backend="tv", options=STRICT)
    with tvcompile.collect() as report:
        for S in (24, 40, 33, 57):
            torch.testing.assert_close(compiled(*qkv(S)), causal(*qkv(S)))
    assert report.graphs == 2 and len(report.sites) == 2


def test_bottom_right_causal_with_sizes_as_symints():
    def decode(q, k, v):
        rows = torch.arange(q.shape[2]) + k.shape[2] - q.shape[2]
        keep = torch.arange(k.shape[2])[None] <= rows[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    compiled = torch.compile(decode, backend="tv", options=STRICT, dynamic=True)
    with tvcompile.collect() as report:
        for S_q, S_kv in ((8, 24), (8, 31), (5, 40)):
            q, (_, k, v) = qkv(S_q)[0], qkv(S_kv)
            torch.testing.assert_close(compiled(q, k, v), decode(q, k, v))
    assert report.graphs == 1
    assert "S_q" in report.sites[0].spec and "S_kv" in report.sites[0].spec


def test_float_argument_does_not_recompile_with_dynamic_shapes():
    def scaled(q, k, v, scale):
        return (q @ k.mT * scale).softmax(-1) @ v

    compiled = torch.compile(scaled, backend="tv", options=STRICT, dynamic=True)
    with tvcompile.collect() as report:
        for scale in (0.3, 0.7, 1.1):
            torch.testing.assert_close(compiled(*qkv(), scale), scaled(*qkv(), scale))
    assert report.graphs == 1 and len(report.sites) == 1


def test_autocast_forward_and_backward():
    def program(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return causal(q, k, v)

    args = qkv(requires_grad=True)
    out = torch.compile(program, backend="tv", options=STRICT)(*args)
    assert out.dtype == program(*args).dtype == torch.bfloat16
    torch.testing.assert_close(out, program(*args), atol=3e-2, rtol=0)
    grads = torch.autograd.grad(out.float().pow(2).sum(), args)
    for got, want in zip(grads, torch.autograd.grad(program(*args).float().pow(2).sum(), args)):
        torch.testing.assert_close(got, want, atol=8e-2, rtol=0)


def test_a_loop_of_experts_under_autocast_in_training():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.ModuleList(torch.nn.Linear(16, 32) for _ in range(4))
            self.down = torch.nn.ModuleList(torch.nn.Linear(32, 16) for _ in range(4))

        def forward(self, x, scores):
            with torch.autocast("cpu", torch.bfloat16):
                w, ids = scores.softmax(-1).topk(2, -1)
                out = torch.zeros(x.shape, dtype=torch.bfloat16)
                for e, (up, down) in enumerate(zip(self.up, self.down)):
                    token, k = torch.where(ids == e)
                    out.index_add_(0, token, (down(up(x[token]).tanh()) * w[token, k, None]).to(out.dtype))
            return out

    torch._dynamo.reset()
    experts, x, scores = Experts(), torch.randn(20, 16, requires_grad=True), torch.randn(20, 4)
    with tvcompile.collect() as report:
        got = torch.compile(experts, backend="tv", options={"tv.strict": True})(x, scores)
    assert len(report.sites) == 1 and not report.refusals
    want = experts(x, scores)
    torch.testing.assert_close(got, want, atol=3e-2, rtol=3e-2)
    for a, b in zip(*(torch.autograd.grad(y.sum(), [x, *experts.parameters()]) for y in (got, want)), strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_attention_inside_an_activation_checkpoint_is_fused():
    def block(q, k, v):
        return checkpoint(causal, q, k, v, use_reentrant=False) + q

    args = qkv(requires_grad=True)
    with tvcompile.collect() as report:
        out = torch.compile(block, backend="tv", options=STRICT)(*args)
    assert len(report.sites) == 1 and report.graphs == 1 and not report.breaks
    grads = torch.autograd.grad(out.sum(), args)
    for got, want in zip(grads, torch.autograd.grad(block(*args).sum(), args)):
        torch.testing.assert_close(got, want)


def test_dropout_inside_a_checkpoint_repeats_its_mask():
    def block(q, k, v):
        return checkpoint(lambda a, b, c: F.dropout((a @ b.mT).softmax(-1), 0.5) @ c, q, k, v, use_reentrant=False)

    q, k, _ = qkv()
    v = torch.eye(24).expand(2, 4, 24, 24).clone().requires_grad_()
    with tvcompile.collect() as report:
        out = torch.compile(block, backend="tv", options=STRICT)(q, k, v)
    assert "dropout=0.5" in report.sites[0].spec
    # out is the dropped weights themselves; the gradient of sum(out * c) in v is weights^T @ c.
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(grad, out.detach().mT @ torch.ones(24, 24))


def test_dropout_follows_manual_seed():
    compiled = torch.compile(lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.3) @ v, backend="tv", options=STRICT)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(compiled(*qkv()))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_higher_order_operator_is_left_whole_and_the_rest_is_fused():
    def program(q, k, v):
        x = torch.cond(q.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (q,))
        return causal(x, k, v)

    with tvcompile.collect() as report:
        out = torch.compile(program, backend="tv", options=STRICT)(*qkv())
    torch.testing.assert_close(out, program(*qkv()))
    assert len(report.sites) == 1 and "cond" in str(report)


def test_graph_break_is_reported_and_both_sides_are_fused():
    def program(q, k, v):
        x = causal(q, k, v)
        torch._dynamo.graph_break()
        return causal(x, k, v)

    report = tvcompile.explain(program, options=STRICT)(*qkv())
    assert len(report.sites) == 2 and report.graphs == 2 and report.breaks


def test_cache_written_in_place():
    def step(q, k, v, k_cache, v_cache, at):
        k_cache.index_copy_(2, at, k)
        v_cache.index_copy_(2, at, v)
        keep = torch.arange(k_cache.shape[2])[None] <= at[:, None]
        return F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=keep)

    compiled = torch.compile(step, backend="tv", options=STRICT, fullgraph=True)
    ours, theirs = ([torch.zeros(2, 4, 32, 16) for _ in range(2)] for _ in range(2))
    with tvcompile.collect() as report:
        for at in range(3):
            q, k, v = (x[:, :, at : at + 1] for x in qkv())
            at = torch.tensor([at])
            torch.testing.assert_close(compiled(q, k, v, *ours, at), step(q, k, v, *theirs, at))
    torch.testing.assert_close(ours, theirs)
    assert len(report.sites) == report.graphs == 1


def test_unknown_option_lists_the_known_ones():
    with pytest.raises(Exception, match=r"unknown option tv\.strikt.*tv\.codegen, tv\.log, tv\.selfcheck, tv\.strict"):
        torch.compile(causal, backend="tv", options={"tv.strikt": True})(*qkv())


def test_strict_is_true_or_false():
    with pytest.raises(Exception, match="tv.strict must be True or False; got 'no'"):
        torch.compile(causal, backend="tv", options={"tv.strict": "no"})(*qkv())


def test_inductor_options_pass_through():
    with pytest.raises(Exception, match="no_such_inductor_option"):
        torch.compile(causal, backend="tv", options={"no_such_inductor_option": 1})(*qkv())
    torch._dynamo.reset()
    out = torch.compile(causal, backend="tv", options={**STRICT, "epilogue_fusion": False})(*qkv())
    torch.testing.assert_close(out, causal(*qkv()))


def test_mode_passes_through():
    out = torch.compile(causal, backend="tv", mode="reduce-overhead")(*qkv())
    torch.testing.assert_close(out, causal(*qkv()))


def test_internal_error_falls_back_with_one_warning(monkeypatch):
    def broken(graph):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(backend, "LIFTS", (broken,))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = torch.compile(causal, backend="tv")(*qkv())
    torch.testing.assert_close(out, causal(*qkv()))
    ours = [w for w in seen if "tvcompile" in str(w.message)]
    assert len(ours) == 1 and "on purpose" in str(ours[0].message) and "in broken" in str(ours[0].message)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="on purpose"):
        torch.compile(causal, backend="tv", options=STRICT)(*qkv())
    assert backend.LIFTS != LIFTS


def test_dynamic_output_shapes_are_captured_for_this_backend_only():
    def masked_sum(x, m):
        return (x[m] * 2).sum()

    x = torch.randn(16)
    with tvcompile.collect() as report:
        torch.testing.assert_close(torch.compile(masked_sum, backend="tv")(x, x > 0), masked_sum(x, x > 0))
    assert report.graphs == 1 and not report.breaks
    assert torch._dynamo.config.capture_dynamic_output_shape_ops is False
    graphs = []
    torch._dynamo.reset()
    torch.compile(masked_sum, backend=lambda gm, _: graphs.append(gm) or gm.forward)(x, x > 0)
    assert len(graphs) == 2, "another backend's frames must not see our context"


def test_parameters_keep_their_gradients_through_a_module():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

        def forward(self, x):
            q, k, v = (y.view(*x.shape[:2], 4, 8).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            return self.out(causal(q, k, v).transpose(1, 2).reshape(x.shape))

    block, x = Block(), torch.randn(2, 24, 32)
    compiled = torch.compile(block, backend="tv", options=STRICT)
    compiled(x).pow(2).sum().backward()
    got = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    block(x).pow(2).sum().backward()
    for g, p in zip(got, block.parameters()):
        torch.testing.assert_close(g, p.grad)


SECOND_PROCESS = """
import torch
from torch._dynamo.utils import counters
i = torch.arange(24)
def f(q): return (q @ q.mT / 4).masked_fill(i[None] > i[:, None], float("-inf")).softmax(-1) @ q
q = torch.ones(2, 4, 24, 16, requires_grad=True)
torch.compile(f, backend="tv", options={"tv.strict": True})(q).sum().backward()
print("hits", counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"])
"""


def test_second_process_hits_the_caches(tmp_path):
    import os

    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", SECOND_PROCESS], env=env, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    first, second = (r.stdout.split()[-2:] for r in runs)
    assert first == ["0", "0"] and second != ["0", "0"], (first, second)


class WritesInItsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, at):
        ctx.save_for_backward(at)
        return x.sum(-1)

    @staticmethod
    def backward(ctx, g):
        (at,) = ctx.saved_tensors
        grad = g.unsqueeze(-1).repeat(1, 1, 1, 16)
        grad.scatter_add_(-1, at, g.unsqueeze(-1))
        return grad, None


def test_a_write_inside_an_autograd_function_stays():
    def program(q, k, v):
        out = causal(q, k, v)
        return WritesInItsBackward.apply(out, torch.zeros(2, 4, 24, 1, dtype=torch.int64))

    args = qkv(requires_grad=True)
    out = torch.compile(program, backend="tv", options=NO_CODEGEN)(*args)
    grads = torch.autograd.grad(out.sum(), args)
    for got, want in zip(grads, torch.autograd.grad(program(*args).sum(), args)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("strided", range(3))
def test_operands_whose_features_are_strided(strided):
    tensors = [x.mT.contiguous().mT if i == strided else x for i, x in enumerate(qkv())]
    out, *_ = torch.ops.tv.attention(*tensors, [], [], "scale=0.25", None)
    want = (tensors[0] @ tensors[1].mT / 4).softmax(-1) @ tensors[2]
    torch.testing.assert_close(out, want)


def test_a_list_of_unknown_length_ends_the_graph_not_the_program():
    def by_expert(x, ids):
        parts = x[ids.argsort()].split(torch.bincount(ids, minlength=3).tolist())
        return torch.cat([part * k for k, part in enumerate(parts)])

    x, ids = torch.randn(9, 4), torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1])
    assert torch.equal(torch.compile(by_expert, backend="tv")(x, ids), by_expert(x, ids))


def test_a_size_that_only_data_tells_breaks_the_graph_not_the_program():
    def by_expert(x, ids):
        out = torch.zeros_like(x)
        for e in range(3):
            (token,) = torch.where(ids == e)
            rows = torch.cat(list((x[token] * e).split(2))) if len(token) else x[token]
            out = out.index_add(0, token, rows)
        return out

    x, ids = torch.randn(9, 4), torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1])
    assert torch.equal(torch.compile(by_expert, backend="tv")(x, ids), by_expert(x, ids))


def test_a_size_without_a_formula_hides_nothing_else():
    def program(q, ids):
        (token,) = torch.where(ids == 1)
        h = q[0, 0, token]
        h = F.pad(h, (0, 0, 0, 3 - h.shape[0] % 3)).view(-1, 3, 16).sum(1).repeat_interleave(3, 0)[: h.shape[0]]
        weights = (q @ q.mT * 0.25).softmax(-1)
        return weights @ q, q[0, 0].index_add(0, token, h @ h.new_ones(16, 16) * ids[token, None])

    q, ids = torch.randn(1, 2, 9, 16), torch.tensor([0, 1, 1, 1, 0, 2, 1, 0, 1])
    with tvcompile.collect() as report:
        found = torch.compile(program, backend="tv", options={"tv.strict": True})(q, ids)
    torch.testing.assert_close(found, program(q, ids))
    assert len(report.sites) == 1


def test_a_rewritten_graph_that_does_not_compile_is_left_to_inductor(monkeypatch):
    whole = backend.hand_off

    def fails_once_rewritten(program, *how):
        if any("tv." in str(n.target) for n in program.graph.nodes):
            raise RuntimeError("no such kernel")
        return whole(program, *how)

    monkeypatch.setattr(backend, "hand_off", fails_once_rewritten)

    def program(q):
        return (q @ q.mT * 0.25).softmax(-1) @ q

    q = torch.randn(1, 2, 9, 16)
    with pytest.warns(UserWarning, match="left it to Inductor: RuntimeError: no such kernel"):
        found = torch.compile(program, backend="tv")(q)
    torch.testing.assert_close(found, program(q))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no such kernel"):
        torch.compile(program, backend="tv", options={"tv.strict": True})(q)
