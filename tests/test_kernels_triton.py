"""Triton kernels against the formula in float64: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernel_cases import H_KV, SHAPES, SPECS, B, D, H, captures_of, compare, results
from tvcompile import expr as E, syntax
from tvcompile.arch import Device
from tvcompile.kernels import mods
from tvcompile.kernels.attention import attention_ref
from tvcompile.kernels.problem import Given, Gradients, Kernel, Need, Problem

triton = pytest.importorskip("triton", reason="no Triton beside this PyTorch")

from tvcompile.kernels import data as data_, flash, flash_fwd, mint  # noqa: E402
from tvcompile.kernels.blocks import count_runs, next_run  # noqa: E402
from tvcompile.spec import AttentionSpec  # noqa: E402
from tvcompile.tuning import choose  # noqa: E402
from tvcompile.tuning.attention import Ask, Config, work_of  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(p: Problem, device: str) -> Problem:
    captures = {name: x.to(device) for name, x in p.scope.captures.items()}
    q, k, v = (x.to(device) for x in (p.q, p.k, p.v))
    seed = None if p.seed is None else p.seed.to(device)
    return dataclasses.replace(
        p, q=q, k=k, v=v, seed=seed, scope=p.scope.at(captures=captures, device=torch.device(device))
    )


def kernel(*configs: Config) -> Kernel:
    """The Triton kernels at the configs of forward, dq and dkdv, or one for all, for problems on the CPU."""
    configs = configs if len(configs) == 3 else configs * 3

    def run(p: Problem):
        return tuple(x.cpu() for x in flash.forward(moved(p, DEVICE), configs[0]))

    def back(p: Problem, given: Given, wanted: tuple[str, ...]):
        there = Given(*(x.to(DEVICE) for x in (given.grad_out, given.out, given.lse, given.rest) if x is not None))
        found = flash.backward(moved(p, DEVICE), there, wanted, *configs[1:])
        return Gradients(
            found.dq.cpu(), found.dk.cpu(), found.dv.cpu(), {n: x.cpu() for n, x in found.captures.items()}
        )

    def supports(need: Need) -> None:
        reason = flash.supports(dataclasses.replace(need, device=Device.typical("sm90")))
        assert reason is None, reason

    return Kernel("triton", "cuda", supports, run, back)


def forward_only(config: Config) -> Kernel:
    """Of the kernels the forward at a config; no gradient is asked for."""
    whole = kernel(config)

    def supports(need: Need) -> str | None:
        return whole.supports(need) if need.wanted is None else "forward only"

    return dataclasses.replace(whole, supports=supports)


SMALL, WIDE = kernel(Config(32, 32, 4, 2)), kernel(Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_forward_agrees_with_the_formula(spec, shape):
    compare(SMALL if shape != SHAPES["square"] else WIDE, spec, shape, torch.float32)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_forward_in_half_precision_keeps_eagers_accuracy(spec):
    compare(SMALL, spec, SHAPES["odd"], torch.float16)


GROWING = ["scale=1", "scale=1; keep = kv <= q", "scale=1; score = s/2.0; keep = kv <= q", "scale=1; sink = sink[h]"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spec", GROWING)
def test_maxima_that_outgrow_what_rows_are_measured_by(spec, dtype):
    check_growing_maxima(spec, dtype)


@pytest.mark.parametrize("spec", GROWING)
def test_sums_that_are_rescaled_at_every_block(spec, monkeypatch):
    """As with Triton before 3.8, and in specialised warps."""
    monkeypatch.setattr(flash_fwd, "ASKS", flash_fwd.tl.constexpr(False))
    check_growing_maxima(spec, torch.float32)


def check_growing_maxima(spec, dtype):
    """Scores grow along kv, in some rows within the slack of a whole pass, in others beyond it in every block; one is
    infinite, which is no matter of the others."""
    S = 160
    slopes = torch.logspace(-3, 1, S).expand(B, H, S).clone()
    slopes[:, :, 70] = float("inf")
    q, k = torch.zeros(B, H, S, D), torch.zeros(B, H_KV, S, D)
    q[..., 0], k[..., 0] = slopes, (torch.arange(S) + 1) / 16
    q, k, v = (x.to(dtype) for x in (q, k, torch.randn(B, H_KV, S, D)))
    captures = captures_of(spec, S, S, dtype)
    out, lse = SMALL.forward(Problem.of(q, k, v, captures, [], spec, None))[:2]
    wide = [c.double() for c in captures]
    exact, exact_lse = attention_ref(q.double(), k.double(), v.double(), wide, [], spec)
    others = torch.arange(S) != 70
    assert bool(out[:, :, 70].isnan().all()) and bool(out[:, :, others].isfinite().all())
    rounding = {torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(out[:, :, others].double(), exact[:, :, others], rtol=0, atol=4 * rounding)
    torch.testing.assert_close(lse[:, :, others].double(), exact_lse[:, :, others], rtol=1e-5, atol=1e-5)


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
    out, lse, rest = SMALL.forward(p)
    found = SMALL.backward(p, Given(direction, out, lse, rest), ("bias",))
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
    "pow(0.25, float32(h + 1))*float32(kv) + pow(1.7, s)",
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


def runs(spec: str, S_q: int, S_kv: int, row: int, want: int, captures=()) -> list[list[int]]:
    """[first, last) of the runs of one kind that a program finds for q block `row`, in blocks of 16."""
    import triton.language as tl

    q, k = torch.empty(1, 1, S_q, 16), torch.empty(1, 1, S_kv, 16)
    p = moved(Problem.of(q, k, k, list(captures), [], spec, None), DEVICE)
    data, formulas = data_.arguments(p, Config(16, 16, 4, 1))

    @triton.jit
    def find(out_ptr, data, S_q, S_kv, ROW: tl.constexpr, WANT: tl.constexpr, KINDS: tl.constexpr, SAME: tl.constexpr):
        low, high = ROW * 16, tl.minimum(ROW * 16 + 16, S_q) - 1
        at, end = tl.cast(0, tl.int32), tl.cast(tl.cdiv(S_kv, 16), tl.int32)
        for _ in range(count_runs(at, end, 0, 0, 0, low, high, S_kv, data, WANT, KINDS, 16, False, SAME)):
            first, last = next_run(at, end, 0, 0, 0, low, high, S_kv, data, WANT, KINDS, 16, False, SAME)
            tl.store(out_ptr, first)
            tl.store(out_ptr + 1, last)
            out_ptr += 2
            at = last

    out = torch.full((64, 2), -1, dtype=torch.int32, device=DEVICE)
    find[(1,)](out, data.arguments, S_q, S_kv, row, want, formulas["KINDS"], formulas["SAME"])
    return [pair for pair in out.tolist() if pair[0] < pair[1]]


def test_runs_skip_what_keep_hides_and_mask_only_the_borders():
    spec = "scale=1; keep = kv <= q & q - kv < 64"
    assert runs(spec, 128, 128, 5, want=2) == [[2, 5]]
    assert runs(spec, 128, 128, 5, want=1) == [[1, 2], [5, 6]]
    assert runs("scale=1", 100, 100, 0, want=2) == [[0, 6]]
    assert runs("scale=1", 100, 100, 0, want=1) == [[6, 7]]


def test_runs_are_found_beyond_the_first_chunk_of_blocks():
    spec = "scale=1; keep = kv <= q & q - kv < 48 | kv < 32"
    assert runs(spec, 5000, 5000, 200, want=2) == [[0, 2], [198, 200]]
    found = runs("scale=1; keep = kv <= q", 5000, 5000, 300, want=2)
    assert found[0][0] == 0 and found[-1][1] == 300
    assert all(one[1] == other[0] for one, other in zip(found, found[1:]))


def test_captured_ids_and_masks_skip_blocks():
    documents, spec = torch.arange(128).view(1, 128) // 40, "scale=1; keep = ids[b, q] == ids[b, kv]; empty=zero"
    assert runs(spec, 128, 128, 3, 1, [documents]) == [[2, 3]]
    assert runs(spec, 128, 128, 3, 2, [documents]) == [[3, 5]]
    mask = torch.zeros(1, 1, 128, 128, dtype=torch.bool)
    mask[..., 16:32, 48:64] = True
    mask[..., 16:32, 100] = True
    assert runs("scale=1; keep = mask[b, h, q, kv]; empty=zero", 128, 128, 1, 2, [mask]) == [[3, 4]]
    assert runs("scale=1; keep = mask[b, h, q, kv]; empty=zero", 128, 128, 1, 1, [mask]) == [[6, 7]]


def test_additive_masks_skip_blocks_where_they_hide_everything():
    spec = "scale=1; score = s + bias[b, q, kv]"
    mask = torch.zeros(1, 128, 128).masked_fill(torch.arange(128) >= 80, -float("inf"))
    mask[0, 20, 100] = 0.0
    assert runs(spec, 128, 128, 1, 2, [mask]) == [[0, 5], [6, 7]]
    assert runs(spec, 128, 128, 2, 2, [mask]) == [[0, 5]]
    lowest = torch.finfo(torch.float32).min
    assert runs(spec, 128, 128, 2, 2, [mask.clamp_min(lowest)]) == [[0, 5]]
    # A row in which nothing counts averages over all keys.
    mask[0, 40] = -float("inf")
    assert runs(spec, 128, 128, 2, 2, [mask.clamp_min(lowest)]) == [[0, 8]]
    assert runs(spec, 128, 128, 3, 2, [mask.clamp_min(lowest)]) == [[0, 5]]


@pytest.mark.parametrize("splits, shape", [(1, (1, 200)), (3, (3, 131))], ids=["one", "three"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_few_rows_take_the_heads_of_a_group_together_and_share_out_the_keys(spec, splits, shape):
    # With dropout one program sees the whole row.
    config = Config(16, 32, 4, 2, packed=True, splits=1 if "dropout" in spec else splits)
    compare(forward_only(config), spec, shape, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", [(515, 777), (3, 777)], ids=["many", "few"])
def test_the_chosen_configs_are_right_on_this_gpu(spec, dtype, shape):
    few = shape[0] == 3
    passes = ("decode" if few else "fwd", "dq", "dkdv")
    device, work = Device.of(torch.device("cuda")), work_of(AttentionSpec.parse(spec))
    # One row stands for the few that a whole group has.
    rows = shape[0] * H // H_KV
    found = [choose(Ask(device, x, str(dtype)[6:], D, D, work, rows, keys=777)) for x in passes]
    if not all(found):
        pytest.skip(f"no configs for {device.arch}")
    forward, *backward = (choices[0].config for choices in found)
    if "dropout" in spec:
        forward = dataclasses.replace(forward, splits=1)
    compare(kernel(forward, *backward), spec, shape, dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    s = q @ k.transpose(-1, -2) / 8.0
    return s.masked_fill(~mask, float("-inf")).softmax(-1) @ v


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_program_runs_on_this_gpu_and_in_a_cuda_graph(mode):
    tensors = [torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3)]
    mask = torch.ones(300, 300, dtype=torch.bool, device="cuda").tril()
    call = torch.compile(attend, backend="tv", mode=mode)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want = attend(*exact, mask)
    for _ in range(4):
        out = call(*tensors, mask)
        torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)
        grads = torch.autograd.grad(out.sum(), tensors)
    for g, e in zip(grads, torch.autograd.grad(want.sum(), exact)):
        torch.testing.assert_close(g.double(), e, rtol=1e-2, atol=2e-2)
