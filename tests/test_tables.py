"""A part of `make tables` at each turn, and how rows of the table come to say what they serve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton beside this PyTorch")

from tests.harness import TURN
from tools import tables
from tvcompile.arch import SHARED

ROOT = Path(__file__).resolve().parent.parent
# What `tools/tables.py` finds nothing wrong with, as a whole -> in how many turns it comes by.
COMPLETE = {
    "--dtype bfloat16 --op attention": 200,
    "--dtype float16 --op attention": 200,
    "--dtype float32 --op attention --pass fwd decode --arch sm80 sm86 sm89 sm90 sm100 sm120": 90,
    "--dtype float32 --op attention --pass dq dkdv --arch sm80 sm86 sm89 sm90 sm100 sm120": 60,
    "--dtype bfloat16 float16 --op moe": 240,
    "--dtype float32 --op moe": 120,
}


@pytest.mark.parametrize("what", COMPLETE)
def test_a_part_of_all_that_can_be_chosen_compiles_fits_and_does_not_spill(tmp_path, what):
    # The interpreter of the other tests would take the kernels' place.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    file = tmp_path / "found.json"
    part = f"{TURN % COMPLETE[what]}/{COMPLETE[what]}"
    command = [sys.executable, "tools/tables.py", *what.split(), "--part", part, "--json", str(file)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads(file.read_text())
    assert len(found) >= 5 and all(row["registers"] > 0 for row in found)


def test_the_parts_are_of_everything():
    found = list(tables.cases([], ["attention", "moe"], [], []))
    assert {(c.op, c.arch, c.dtype) for c in found} == {
        (op, arch, dtype) for op in ("attention", "moe") for arch in SHARED for dtype in tables.DTYPES
    }
    assert {c.work for c in found if c.op == "attention"} == set(tables.WORKS)
    assert len({c.model for c in found if c.op == "moe"}) == 10
    assert len(set(map(str, found))) == len(found) > 6000


def serving(monkeypatch, good) -> None:
    """Compiling finds a spill unless good(BLOCK_M, work); shared memory is BLOCK_M KiB."""

    def compiled(case, config):
        wrong = "" if good(config.BLOCK_M, case.work) else "3 spills"
        return {"wrong": wrong, "shared": config.BLOCK_M << 10, "spills": 3 * bool(wrong)}

    monkeypatch.setattr(tables, "compiled", compiled)


CELL = ("sm90", "dq", 2, 128)
BIG = {
    "when": {"arch": "sm90", "pass_": "dq", "size": 2, "width": 128},
    "config": {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2, "descriptors": True},
}


def test_a_row_that_serves_everything_is_not_limited(monkeypatch):
    serving(monkeypatch, lambda M, work: True)
    assert tables.covered(CELL, [BIG], "bfloat16") == [{**BIG, "shared": 128 << 10}]


def test_a_row_says_what_it_serves_and_a_smaller_one_serves_the_rest(monkeypatch):
    serving(monkeypatch, lambda M, work: M <= 64 or not {"data", "causal+bias", "mask+bias"} & {work})
    first, second = tables.covered(CELL, [BIG], "bfloat16")
    assert first["when"]["mask"] == ["full", "causal", "mask"]
    assert first["when"]["edits"] == ["sink", "mean", "score", "dropout"]
    assert second["config"]["BLOCK_M"] == 64 and second["config"]["descriptors"] and second["shared"] == 64 << 10
    assert second["when"] == BIG["when"]


def test_edits_that_spill_together_are_not_served_together(monkeypatch):
    serving(monkeypatch, lambda M, work: M <= 64 or work.count("+") < 3)
    first, second, rest = tables.covered(CELL, [BIG], "bfloat16")
    assert first["when"]["edits"] == ["sink", "mean", "score"]
    assert second["when"] == {**BIG["when"], "edits": ["dropout", "bias"]}
    assert rest["when"] == BIG["when"] and rest["config"]["BLOCK_M"] == 64


def test_each_edit_gets_the_largest_that_serves_it(monkeypatch):
    most = {"dropout": 64, "bias": 32}
    serving(monkeypatch, lambda M, work: all(M <= most.get(edit, 128) for edit in work.split("+")))
    first, *more, rest = tables.covered(CELL, [BIG], "bfloat16")
    assert first["when"]["edits"] == ["sink", "mean", "score"]
    assert rest["when"] == BIG["when"] and rest["config"]["BLOCK_M"] == 32
    assert [(row["when"]["edits"], row["config"]["BLOCK_M"]) for row in more] == [(["dropout"], 64), (["bias"], 32)]


def test_where_nothing_serves_all_edits_no_row_claims_to(monkeypatch):
    serving(monkeypatch, lambda M, work: work.count("+") < 3)
    assert all("edits" in row["when"] for row in tables.covered(CELL, [BIG], "bfloat16"))


def test_no_row_is_written_for_what_one_before_it_serves(monkeypatch):
    serving(monkeypatch, lambda M, work: work.partition("+")[0] != "data")
    (row,) = tables.covered(CELL, [BIG], "bfloat16")
    assert row["when"]["mask"] == ["full", "causal", "mask"] and "edits" not in row["when"]


def test_a_row_that_serves_nothing_goes(monkeypatch):
    serving(monkeypatch, lambda M, work: M <= 64)
    (row,) = tables.covered(CELL, [BIG], "bfloat16")
    assert row["config"]["BLOCK_M"] == 64 and "mask" not in row["when"]
    serving(monkeypatch, lambda M, work: False)
    assert tables.covered(CELL, [BIG], "bfloat16") == []


def test_a_row_of_16_bits_serves_what_spills_in_neither_dtype(monkeypatch):
    def compiled(case, config):
        spills = case.dtype == "float16" and "bias" in case.work and config.BLOCK_M > 32
        return {"wrong": "3 spills" * spills, "shared": config.BLOCK_M << 10, "spills": 3 * spills}

    monkeypatch.setattr(tables, "compiled", compiled)
    rows = tables.covered(CELL, [BIG], "bfloat16")
    assert [row["when"] for row in rows] == [BIG["when"]]
    first, second, *_ = tables.covered(CELL, rows, "float16")
    assert first["when"] == {**BIG["when"], "edits": ["sink", "mean", "score", "dropout"]}
    assert first["config"] == BIG["config"] and second["config"]["BLOCK_M"] == 32


@pytest.mark.parametrize("work", [*tables.WORKS, "data+bias+dropout+sink+mean", "full+score+sink"])
def test_a_class_of_work_has_a_spec_of_its_own(work):
    from tvcompile.spec import AttentionSpec
    from tvcompile.tuning.attention import work_of
    from tvcompile.tuning.cross_compile import spec_of

    assert work_of(AttentionSpec.parse(spec_of(work))) == work


PROBE = """
import sys
sys.path.insert(0, "tools")
import tables
from tvcompile.tuning.attention import Config

case = tables.Case("attention", sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5], 4096)
row = tables.compiled(case, Config(*map(int, sys.argv[6:])))
print("found", row["spills"] > 0, row["needed"] > 0, bool(row["wrong"]))
"""


@pytest.mark.parametrize(
    "case, needed",
    [("sm90 float32 dq 256 causal+mean 32 16 8 1", True), ("sm80 bfloat16 dkdv 64 causal+score 16 32 8 1", False)],
)
def test_spills_for_want_of_registers_are_told_from_those_for_more_programs(case, needed):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROBE, *case.split()]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.endswith(f"found True {needed} True\n"), run.stdout + run.stderr
