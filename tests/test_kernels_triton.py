"""Triton kernels against the formula in float64: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernel_cases import H_KV, SHAPES, SPECS, B, D, H, captures_of, compare, results
from tvcompile import expr as E, syntax
from tvcompile.kernels import mods
from tvcompile.kernels.attention import attention_ref
from tvcompile.kernels.problem import Given, Gradients, Kernel, Problem

triton = pytest.importorskip("triton", reason="no Triton beside this PyTorch")

from tvcompile.kernels import flash_bwd, flash_fwd, mint  # noqa: E402
from tvcompile.kernels.flash_fwd import Config  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(p: Problem, device: str) -> Problem:
    captures = {name: x.to(device) for name, x in p.scope.captures.items()}
    q, k, v = (x.to(device) for x in (p.q, p.k, p.v))
    return dataclasses.replace(p, q=q, k=k, v=v, scope=p.scope.at(captures=captures, device=torch.device(device)))


def kernel(*configs: Config) -> Kernel:
    """The Triton kernels at the configs of forward, dq and dkdv, or one for all, for problems on the CPU."""
    configs = configs if len(configs) == 3 else configs * 3

    def run(p: Problem):
        return tuple(x.cpu() for x in flash_fwd.forward(moved(p, DEVICE), configs[0]))

    def back(p: Problem, given: Given, wanted: tuple[str, ...]):
        there = Given(*(x.to(DEVICE) for x in (given.grad_out, given.out, given.lse)))
        found = flash_bwd.backward(moved(p, DEVICE), there, wanted, *configs[1:])
        return Gradients(
            found.dq.cpu(), found.dk.cpu(), found.dv.cpu(), {n: x.cpu() for n, x in found.captures.items()}
        )

    return Kernel("triton", "cuda", flash_fwd.supports, run, back)


SMALL = kernel(Config(32, 32, 4, 2))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_forward_agrees_with_the_formula(spec, shape):
    compare(SMALL, spec, shape, torch.float32)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_forward_in_half_precision_keeps_eagers_accuracy(spec):
    compare(SMALL, spec, SHAPES["odd"], torch.float16)


@pytest.mark.parametrize("D_v", [8, 40])
@pytest.mark.parametrize("spec", [SPECS["plain"], SPECS["padded_mean"]], ids=["plain", "padded"])
def test_values_may_be_narrower_or_wider_than_keys(spec, D_v):
    compare(SMALL, spec, SHAPES["odd"], torch.float32, D_v)


@pytest.mark.parametrize("spec", [SPECS["window"], SPECS["padded_mean"]], ids=["window", "padded"])
def test_descriptors_load_the_same(spec):
    compare(kernel(Config(32, 16, 4, 2, True)), spec, SHAPES["odd"], torch.float32)


@pytest.mark.parametrize("scale", ["-0.3", "0.0"])
def test_a_scale_that_is_not_positive(scale):
    compare(SMALL, f"scale={scale}; keep = kv <= q", SHAPES["odd"], torch.float32)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("spec", [SPECS["causal"], SPECS["padded_mean"]], ids=["causal", "padded"])
def test_strided_and_expanded_inputs_and_every_element_written(spec, descriptors, monkeypatch):
    """A descriptor cannot name features that are not next to each other: pointers take their place."""
    S = 70
    q = torch.randn(B, S, H, D).transpose(1, 2)
    k = torch.randn(1, 1, S, D).expand(B, H_KV, S, D)
    v = torch.randn(B, H_KV, S, 2 * D)[..., ::2]
    captures = captures_of(spec, S, S, torch.float32)
    p = Problem.of(q, k, v, captures, [], spec, None)
    empty = Problem.results
    monkeypatch.setattr(Problem, "results", lambda self: tuple(x.fill_(float("nan")) for x in empty(self)))
    found = kernel(Config(32, 32, 4, 2, descriptors)).forward(p)
    torch.testing.assert_close(found, attention_ref(q, k, v, captures, [], spec))


@pytest.mark.parametrize("empty", ["zero", "nan", "mean"])
def test_without_keys_every_row_is_zero_as_a_sum_of_nothing_is(empty):
    q, k = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 0, 16)
    p = Problem.of(q, k, k, [], [], f"scale=1; empty={empty}", None)
    out, lse = SMALL.forward(p)
    assert torch.equal(out, torch.zeros_like(q)) and bool((lse == float("inf")).all())
    found = SMALL.backward(p, Given(q, out, lse), ())
    assert torch.equal(found.dq, torch.zeros_like(q)) and found.dk.shape == k.shape


def test_a_batch_of_none():
    q = torch.randn(0, 2, 5, 16)
    out, lse = SMALL.forward(Problem.of(q, q, q, [], [], "scale=1", None))
    assert out.shape == q.shape and lse.shape == (0, 2, 5)


def test_rows_beyond_the_end_add_nothing_even_where_their_score_is_nan():
    """q is zero there, and this score 0/0."""
    S = 33
    q, k, v, direction = (torch.randn(1, 1, S, D) for _ in range(4))
    bias, spec = torch.rand(S), "scale=0.25; score = s*bias[kv] + s/abs(s); keep = kv <= q"
    p = Problem.of(q, k, v, [bias], [], spec, None)
    out, lse = SMALL.forward(p)
    found = SMALL.backward(p, Given(direction, out, lse), ("bias",))
    exact = results(lambda a, b, c, d: attention_ref(a, b, c, d, [], spec), q, k, v, [bias], direction)
    torch.testing.assert_close([found.dq, found.dk, found.dv, found.captures["bias"]], exact[2:])


def test_ids_that_differ_beyond_32_bits_are_different():
    S = 40
    q = torch.randn(1, 1, S, D)
    ids = (torch.arange(S) // 10 * 2**32).view(1, S)
    spec = "scale=0.25; keep = ids[b, q] == ids[b, kv]"
    p = Problem.of(q, q, q, [ids], [], spec, None)
    torch.testing.assert_close(SMALL.forward(p), attention_ref(q, q, q, [ids], [], spec))


FORMULAS = [
    "(q - kv)//3 + (kv - q)%5",
    "q//7 - kv%4",
    "ids[b, kv - 3]*2 + min(q, 5)",
    "abs(kv - q) + max(kv, 9) - int(float32(q)/3.0)",
    "float32(kv - q)*slope[h]",
    "where(kv <= q & ~(kv%3 == 0), tanh(s/2.0), exp(s) - 1.0)",
    "sigmoid(s) + log(abs(s) + 1.0) + sqrt(abs(s))*sin(s)",
    "where(kv < q | kv == 4, softplus(s), float16(s))",
    "ids2[b, kv]*3 + ids2[b, q]",
    "(q*100000 + kv*99991)*(kv + 100000)%977",
    "ids[b, q + kv] + ids[b, kv - q + 20]",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_minted_formula_gives_what_its_torch_form_gives(text):
    import triton.language as tl

    M, N = 16, 32
    names = ("ids", "slope", "ids2")
    held = {
        "ids": torch.randint(0, 9, (2, N), dtype=torch.int32),
        "slope": torch.rand(3),
        "ids2": torch.full((2, N), 100, dtype=torch.uint8),
    }
    formula = syntax.parse(text)
    p = Problem.of(torch.zeros(2, 3, M, 8), *[torch.zeros(2, 3, N, 8)] * 2, [], [], "scale=1", None)
    s = torch.randn(M, N)
    s, held = s.to(DEVICE), {n: x.to(DEVICE) for n, x in held.items()}
    p = moved(p, DEVICE)
    exact = {n: x.long() if n == "ids2" else x for n, x in held.items()}
    want = mods.tensor(formula, p.scope.at(b=(1, 2), h=(2, 3), captures=exact, s=s)).broadcast_to(1, 1, M, N)[0, 0]
    scored = E.mentions(formula, E.S)
    function = mint.mint(formula, tuple((n, held[n].dim(), False) for n in names), (), scored)

    @triton.jit
    def run(out_ptr, s_ptr, data, F: tl.constexpr, SCORED: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        q, kv = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
        if SCORED:
            value = F(tl.load(s_ptr + q * N + kv), 1, 2, q, kv, data)
        else:
            value = F(1, 2, q, kv, data)
        tl.store(out_ptr + q * N + kv, value + tl.zeros([M, N], tl.float32))

    out = torch.empty(M, N, device=DEVICE)
    layout = tuple(n for name in names for n in (*held[name].shape, *held[name].stride()))
    run[(1,)](out, s, (tuple(held.values()), layout, ()), function, scored, M, N)
    torch.testing.assert_close(out, want.float(), rtol=1e-5, atol=1e-6)


def test_runs_skip_what_keep_hides_and_mask_only_the_borders():
    q = torch.empty(1, 1, 512, 16)
    p = Problem.of(q, q, q, [], [], "scale=1; keep = kv <= q & q - kv < 256", None)
    runs, n_full = flash_fwd.runs_of(p, 64, 64)
    assert n_full == 1 and runs.shape == (8, 3, 2)
    assert runs[5].tolist() == [[128, 320], [64, 128], [320, 384]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_shipped_configs_are_right_on_this_gpu(spec, dtype):
    from tvcompile.arch import arch_of
    from tvcompile.tuning import rows

    arch = arch_of(torch.device("cuda"))
    found = {row.pass_: Config(**row.config) for row in rows() if row.arch == arch and row.D == 128}
    if len(found) < 3:
        pytest.skip(f"no shipped configs for {arch}")
    compare(kernel(found["fwd"], found["dq"], found["dkdv"]), spec, (515, 777), dtype)
