"""What GPUs would run, without one: launches in the graphs of AOTAutograd, their configs, Inductor's source.

The graphs are made in processes of their own: TRITON_INTERPRET, which the other tests run under, takes the place of
kernels that a graph can hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from expecttest import TestCase

pytest.importorskip("triton", reason="no Triton beside this PyTorch")

from tests.harness import TURN
from tests.zoo import ENTRIES
from tvcompile.arch import Device
from tvcompile.tuning import choose
from tvcompile.tuning.attention import Ask

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("sm80", "sm86", "sm90", "sm100", "sm120")
ALWAYS = ("llama", "gpt_oss", "t5")
SLICES = 4
TURNS = 20  # in which all models come by, in inference and in training


def run(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def wrong(row: dict, train: bool) -> str:
    """What is not as it must be in one model: every fusable attention launches our kernels, and only them."""
    if "error" in row:
        return f"{row['case']}: {row['error']}" if row["ours"] else ""
    wide = sum("features, 256 at most" in text for text in row["refusals"])
    n = row["fusable"] - wide
    want = {"attention_fwd": n} | ({"attention_dq": n, "attention_dkdv": n} if train else {})
    found = {k: v for k, v in row["launches"].items() if k.startswith("attention") and k != "attention_merge"}
    if row["sites"] != n or row["left"]:
        return f"{row['case']}: {row['sites']} of {n} sites, {row['left']} left as ops; {row['refusals']}"
    if found != {k: v for k, v in want.items() if v}:
        return f"{row['case']}: launches {found}, expected {want}"
    out, parts = "out_ptr lse_ptr", ("attention_fwd", "attention_merge")
    allowed = {f"{x}: {out}{rest}" for x in parts for rest in ("", " rest_ptr")}
    allowed |= {"attention_dq: dq_ptr", "attention_dkdv: dk_ptr dv_ptr"}
    # Gradients of captures are added to zeros.
    written = [w for w in row["writes"] if w.startswith("attention")]
    strange = [w for w in written if w not in allowed and not w.startswith("attention_dq: dq_ptr data_")]
    return f"{row['case']}: seen to write {strange}" if strange else ""


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("part", range(SLICES))
def test_every_attention_of_the_zoo_launches_our_kernels(part, train, record_property):
    now = [e.name for i, e in enumerate(ENTRIES) if (i + TURN + train) % TURNS == 0 or e.name in ALWAYS]
    names = now[part::SLICES]
    arch = ARCHS[(part + TURN + train) % len(ARCHS)]
    impl, pad = (("eager", "sdpa")[(TURN + part) % 2], ("", "left", "right")[(TURN // 2 + part) % 3])
    how = ["--arch", arch, "--impl", impl, "--pad", pad, *["--train"] * train]
    rows = [json.loads(x) for x in run("tests.gpu_zoo", *how, *names).splitlines() if x.startswith("{")]
    assert len(rows) == len(names)
    found = [w for row in rows if (w := wrong(row, train))]
    traced = [row for row in rows if "error" not in row]
    record_property("gpu", f"{arch} {len(traced)} of {len(rows)} models, {sum(r['sites'] for r in traced)} sites")
    assert not found, "\n".join(found)
    assert len(traced) >= len(rows) // 2, rows


@pytest.fixture(scope="module")
def shown() -> dict:
    """What tests.gpu_program prints: graphs and source of small programs, by name."""
    return json.loads(run("tests.gpu_program"))


class Golden(TestCase):
    shown: dict

    @pytest.fixture(autouse=True)
    def _shown(self, shown):
        self.shown = shown

    def test_forward_and_backward_of_a_causal_program(self):
        self.assertExpectedInline(
            "\n".join(self.shown["training"]),
            """\
forward:
  attention_fwd grid (8, 1, 1) -> out_ptr, lse_ptr
  aten.clone.default
backward:
  aten.mul.Tensor
  aten.sum.dim_IntList
  attention_dq grid (8, 1, 1) -> dq_ptr
  attention_dkdv grid (4, 1, 1) -> dk_ptr, dv_ptr""",
        )

    def test_the_config_is_that_of_the_architecture(self):
        self.assertExpectedInline(
            "\n".join(self.shown["configs"]),
            """\
sm80: BLOCK_M=128 BLOCK_N=64 num_warps=4 num_stages=2
sm86: BLOCK_M=128 BLOCK_N=64 num_warps=4 num_stages=2
sm89: BLOCK_M=128 BLOCK_N=64 num_warps=4 num_stages=2
sm90: BLOCK_M=128 BLOCK_N=128 num_warps=4 num_stages=2 DESCRIPTORS=True
sm100: BLOCK_M=128 BLOCK_N=128 num_warps=8 num_stages=2 DESCRIPTORS=True SPECIALIZE=True
sm120: BLOCK_M=128 BLOCK_N=64 num_warps=4 num_stages=2 DESCRIPTORS=True""",
        )

    def test_dynamic_sizes_stay_in_the_graph(self):
        self.assertExpectedInline(
            "\n".join(self.shown["dynamic"]),
            """\
forward:
  attention_fwd grid ('n', 1, 1) -> out_ptr, lse_ptr
  aten.clone.default
backward:
  aten.mul.Tensor
  aten.sum.dim_IntList
  attention_dq grid ('n', 1, 1) -> dq_ptr
  attention_dkdv grid ('n', 1, 1) -> dk_ptr, dv_ptr""",
        )

    def test_a_captured_mask_is_bounded_once_for_all_layers(self):
        self.assertExpectedInline(
            "\n".join(self.shown["mask"]),
            """\
forward:
  aten.amin.default
  aten.amax.default
  attention_fwd grid (8, 1, 1) -> out_ptr, lse_ptr
  aten.clone.default
  attention_fwd grid (8, 1, 1) -> out_ptr, lse_ptr""",
        )
        launched = [line for line in self.shown["shared"] if ".run(" in line]
        assert sum("attention_fwd" in line for line in launched) == 2
        assert sum("amax" in line and "_red_" in line for line in launched) == 1, launched

    def test_one_row_is_decoded_in_splits(self):
        self.assertExpectedInline(
            "\n".join(self.shown["decode"]),
            """\
inference:
  attention_fwd grid (2, 16, 1) -> out_ptr, lse_ptr
  attention_merge grid (2, 1, 1) -> out_ptr, lse_ptr
BLOCK_M=16 BLOCK_N=128 num_warps=2 num_stages=2 PACKED=True SPLIT=True""",
        )


def test_a_package_of_aotinductor_launches_the_kernels_itself(shown):
    assert shown["packaged"] == ["attention_fwd", "experts_up", "experts_rows", "experts_combine"]


def test_inductor_launches_the_kernel_itself(shown):
    source = shown["source"]
    assert "@triton.jit\ndef _sweep(" in source and "torch.ops.tv" not in source
    assert any("attention_fwd" in line and ".run(" in line for line in source.splitlines())
    assert "'fp64'" not in source, "a float argument would make the scores float64"


def test_what_inductor_writes_compiles_from_its_text_alone(shown):
    assert shown["compiled"] == {"attention_fwd": 0, "attention_dq": 0, "attention_dkdv": 0}


@pytest.mark.parametrize("arch", ["sm75", "sm70", "gfx90a"])
def test_an_architecture_without_configs_is_refused(arch):
    assert choose(Ask(Device.typical(arch), "fwd", "bfloat16")) == ()


@pytest.mark.parametrize("arch, family", [("sm103", "sm100"), ("sm121", "sm120"), ("sm87", "sm86")])
def test_a_newer_member_of_a_family_gets_its_configs(arch, family):
    found, known = (choose(Ask(Device.typical(a), "fwd", "bfloat16")) for a in (arch, family))
    assert [c.config for c in found] == [c.config for c in known] and f"fallback from {family}" in found[0].source
