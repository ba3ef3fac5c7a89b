"""tv::attention as the rest of PyTorch sees it: eager's meaning, fakes, autograd, compilation, caches."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tvcompile.kernels
from tvcompile.kernels.attention import attention_ref

B, H, H_KV, S, D = 2, 4, 2, 24, 8
OP = torch.ops.tv.attention.default
CAUSAL = "scale=0.25; keep = kv <= q"
ALIBI = "scale=0.25; score = s + slope[h]*float32(kv - q); keep = kv <= q"


def qkv(S_q=S, S_kv=S, D_v=D, dtype=torch.float64, batch=B):
    shapes = (batch, H, S_q, D), (batch, H_KV, S_kv, D), (batch, H_KV, S_kv, D_v)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def same_gradients(got, want, sources):
    direction = torch.randn_like(want)
    pairs = zip(*(torch.autograd.grad(out, sources, direction) for out in (got, want)))
    for g, w in pairs:
        torch.testing.assert_close(g, w, equal_nan=True)


def eager(fill, cut, q, k, v, pad, bias):
    """What a user writes: additive or filled mask, softmax, product."""
    k, v = (x.repeat_interleave(H // H_KV, 1) for x in (k, v))
    s = q @ k.mT * 0.25 + bias[None, :, None, None]
    keep = torch.ones(S, S, dtype=torch.bool).tril() & pad[:, None, None, :]
    s = s.masked_fill(~keep, fill) if cut else s + torch.zeros(keep.shape, dtype=s.dtype).masked_fill(~keep, fill)
    return s.softmax(-1) @ v


LOWEST = torch.finfo(torch.float64).min
EAGER = {"nan": (-torch.inf, False), "nan_cut": (-torch.inf, True), "mean": (LOWEST, False), "mean_cut": (LOWEST, True)}


@pytest.mark.parametrize("empty", EAGER)
def test_rows_with_nothing_to_attend_mean_what_the_eager_program_means(empty):
    q, k, v = qkv()
    pad, bias = torch.arange(S) >= torch.tensor([[0], [9]]), torch.randn(H, dtype=torch.float64, requires_grad=True)
    spec = f"scale=0.25; score = s + bias[h]; keep = kv <= q & pad[b, kv]; empty={empty}"
    want = eager(*EAGER[empty], q, k, v, pad, bias)
    got = OP(q, k, v, [bias, pad], [], spec, None)[0]
    torch.testing.assert_close(got, want, equal_nan=True)
    same_gradients(got, want, (q, k, v))


def test_a_boolean_mask_of_sdpa_gives_zero():
    q, k, v = qkv()
    pad = torch.arange(S) >= torch.tensor([[0], [9]])
    keep = torch.ones(S, S, dtype=torch.bool).tril() & pad[:, None, None, :]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, keep, scale=0.25, enable_gqa=True)
    got = OP(q, k, v, [pad], [], "scale=0.25; keep = kv <= q & pad[b, kv]; empty=zero", None)[0]
    torch.testing.assert_close(got, want)
    same_gradients(got, want, (q, k, v))


@pytest.mark.parametrize("spec", [CAUSAL, ALIBI], ids=["causal", "alibi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_registration_passes_opcheck(spec, dtype):
    captures = [torch.rand(H, dtype=dtype, requires_grad=True)] if "slope" in spec else []
    torch.library.opcheck(OP, (*qkv(dtype=dtype, D_v=16), captures, [], spec, None))


def test_opcheck_of_dropout():
    torch.library.opcheck(OP, (*qkv(), [], [], "scale=1.0; dropout=0.5", torch.tensor(3)))


@pytest.mark.parametrize("layout", ["heads_first", "heads_last", "one_head", "one_row"])
@pytest.mark.parametrize("spec", [CAUSAL, "scale=1.0; keep = q - kv < 2 & kv <= q", "scale=1.0; score = tanh(s)"])
def test_real_and_fake_results_lie_alike_in_memory(spec, layout):
    shape = {"one_head": (2, 1, 8, D), "one_row": (2, 4, 1, D)}.get(layout, (2, 4, 8, D))
    tensors = [torch.randn(shape) for _ in range(3)]
    if layout == "heads_last":
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    mode = torch._subclasses.FakeTensorMode()
    found = []
    for q, k, v in (tensors, [mode.from_tensor(x) for x in tensors]):
        out, lse, rest = OP(q, k, v, [], [], spec, None)
        grads = torch.ops.tv.attention_backward(out, q, k, v, [], [], spec, None, out, lse, rest, [])
        found.append([(t.shape, t.stride(), t.dtype) for t in (out, lse, rest, *grads[:3])])
    assert found[0] == found[1]


@pytest.mark.parametrize("S_q, S_kv, batch", [(0, 5, 2), (5, 0, 2), (5, 5, 0)])
def test_empty_tensors(S_q, S_kv, batch):
    q, k, v = qkv(S_q, S_kv, batch=batch)
    out, lse, _ = OP(q, k, v, [], [], CAUSAL + "; empty=zero", None)
    assert out.shape == (batch, H, S_q, D) and lse.shape == (batch, H, S_q)
    assert not out.any()
    for g, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v)):
        assert g.shape == x.shape and not g.any()


def test_no_list_is_an_empty_list():
    """As a package of AOTInductor hands it over."""
    q, k, v = qkv()
    got, want = OP(q, k, v, None, None, CAUSAL, None)[0], OP(q, k, v, [], [], CAUSAL, None)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    same_gradients(got, want, [q, k, v])


def test_what_does_not_fit_is_told():
    mode = torch._subclasses.FakeTensorMode()
    q, k, v = (mode.from_tensor(x.detach()) for x in qkv())
    with pytest.raises(ValueError, match="one dtype"):
        OP(q, k.float(), v, [], [], CAUSAL, None)
    with pytest.raises(ValueError, match="shapes do not fit"):
        OP(q, k, v[:, :, 1:], [], [], CAUSAL, None)
    with pytest.raises(ValueError, match="needs a seed"):
        OP(*qkv(), [], [], "scale=1.0; dropout=0.5", None)


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_survives_inductor_with_sizes_and_gradients_of_captures(dynamic):
    def program(q, k, v, slope):
        shift = k.shape[2] - q.shape[2]
        spec = "scale=0.25; score = s + slope[h]*float32(kv - q); keep = kv <= n0 + q"
        out, *_ = OP(q * 2, k, v, [slope], [shift], spec, None)
        return out.transpose(1, 2).flatten(2).sin()

    compiled = torch.compile(program, dynamic=dynamic, fullgraph=True)
    for S_q, S_kv in ((8, 12), (16, 20), (17, 33)):
        leaves = [*qkv(S_q, S_kv), torch.rand(H, dtype=torch.float64, requires_grad=True)]
        got, want = compiled(*leaves), program(*leaves)
        torch.testing.assert_close(got, want)
        same_gradients(got, want, leaves)


def test_dropout_is_the_same_forward_and_backward_and_new_for_another_seed():
    q, k, v = qkv()
    spec = "scale=0.25; dropout=0.4"
    outs = [OP(q, k, v, [], [], spec, torch.tensor(s))[0] for s in (1, 1, 2)]
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])
    want = attention_ref(q, k, v, spec=spec, seed=torch.tensor(1))[0]
    same_gradients(outs[0], want, (q, k, v))


SECOND = """
import torch, tvcompile.kernels
def program(q, k, v):
    return torch.ops.tv.attention(q.sin(), k, v, [], [], "scale=0.5; keep = kv <= q", None)[0] * 2
x = [torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3)]
torch.compile(program)(*x).sum().backward()
from torch._dynamo.utils import counters
print(dict(counters["aot_autograd"]))
"""


def test_a_second_process_finds_the_compiled_program_in_the_cache(tmp_path):
    env = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), TORCHINDUCTOR_COMPILE_THREADS="1")
    runs = [
        subprocess.run([sys.executable, "-c", SECOND], env=env, capture_output=True, text=True, timeout=300)
        for _ in range(2)
    ]
    assert all(r.returncode == 0 for r in runs), runs[-1].stderr
    assert "'autograd_cache_hit': 1" in runs[1].stdout, runs[1].stdout


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("spec", [CAUSAL, "scale=1.0; score = tanh(s); keep = kv <= q"], ids=["causal", "tanh"])
def test_no_tensor_of_training_grows_with_the_square_of_the_length(spec):
    found = []
    for length in (2048, 4096):
        q, k, v = (torch.randn(1, 1, length, 8) for _ in range(3))
        with Largest() as seen:
            p = tvcompile.kernels.Problem.of(q, k, v, [], [], spec, None)
            kernel = tvcompile.kernels.cpu.KERNEL
            out, lse = kernel.forward(p)
            kernel.backward(p, tvcompile.kernels.problem.Given(out, out, lse), ())
        found.append(seen.size)
    assert found[1] <= 2.2 * found[0]


class PassThrough(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", ["scale=0.3; sink = sink[h]", "scale=0.3; score = 5.0*tanh(s/5.0); keep = kv <= q"])
def test_gradients_are_the_same_under_a_dispatch_mode(spec):
    """FLOP counters and selective checkpoints are such modes."""
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    captures = [torch.randn(2, requires_grad=True)] if "sink" in spec else []

    def gradients():
        out = torch.ops.tv.attention(q, k, v, captures, [], spec, None)[0]
        return torch.autograd.grad(out.sin().sum(), [q, k, v, *captures])

    expected = gradients()
    with PassThrough():
        found = gradients()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0
