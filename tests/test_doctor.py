"""What `python -m tvcompile doctor` says of a machine, whole or with something missing."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from rich.console import Console

from tvcompile import __main__, doctor
from tvcompile.arch import Device
from tvcompile.tuning import choose, store
from tvcompile.tuning.attention import Ask
from tvcompile.tuning.kept import Kept


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TVCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    store._memory.clear()
    store._seen.clear()
    choose.cache_clear()


def said() -> tuple[int, str]:
    out = io.StringIO()
    status = doctor.doctor(Console(file=out, width=200))
    return status, out.getvalue()


def with_gpu(monkeypatch, *devices: Device) -> None:
    monkeypatch.setattr(doctor, "gpus", lambda: [("NVIDIA H100", d) for d in devices])


def test_of_this_machine_it_says_versions_processors_and_the_cache(cache):
    status, text = said()
    assert status == 0
    for what in (
        torch.__version__.partition("+")[0],
        "threads",
        "C++",
        str(cache)[:40],
        "0 configs in 0 files",
        "formula",
    ):
        assert what in text, what
    if not torch.cuda.is_available():
        assert "none that PyTorch can use" in text and "note: GPU: CPU kernels serve" in text


def test_of_a_gpu_it_says_which_configs_apply(monkeypatch):
    device = Device.typical("sm90", 132)
    with_gpu(monkeypatch, device, Device.typical("sm103", 148))
    ask = Ask(device, "fwd", "bfloat16", 128, 128, "causal", 4096, 4096)
    store.keep(ask, store.Entry({}, "measured on NVIDIA H100, 2026-11-24"))
    status, text = said()
    assert status == 0 and "NVIDIA H100, sm90, 132 multiprocessors, 227 KiB of shared memory" in text
    line = next(x for x in text.splitlines() if "attention on sm90" in x)
    assert "1 measured here, table sm90:" in line and line.split("table")[1].count("formula")
    assert "sm100 stands in for sm103" in text and "1 configs in 1 files, 1 of these kernels" in text
    assert "ptxas" in text


def test_a_gpu_without_kernels_is_a_note(monkeypatch):
    with_gpu(monkeypatch, Device("sm75", 65536, 40))
    status, text = said()
    assert status == 0 and "note: GPU 0: no kernels for sm75" in text


@pytest.mark.parametrize(
    "program, trouble",
    [
        ("no-such-compiler", "it cannot build a small program"),
        ("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2; exit 1\n", "the C headers of Python are missing"),
        (None, "Inductor needs a C++ compiler"),
    ],
)
def test_a_compiler_that_is_missing_is_fatal(program, trouble, tmp_path, monkeypatch):
    from torch._inductor import cpp_builder

    if program and program.startswith("#!"):
        (tmp_path / "c++").write_text(program)
        (tmp_path / "c++").chmod(0o755)
        program = str(tmp_path / "c++")

    def compiler():
        if program is None:
            raise RuntimeError("no compiler")
        return program

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", compiler)
    status, text = said()
    assert status == 1 and "missing: C++: " in text and trouble in text


def test_a_cache_that_is_corrupt_stale_or_has_failures_is_told(cache):
    (cache / "tuning").mkdir(parents=True)
    (cache / "tuning" / "attention-sm90-0-triton1.0.json").write_text("{")
    Kept(cache / "tuning" / "moe-sm90-0-triton1.0.json").update({"x": {"config": {}, "source": "", "ratio": 1.0}})
    Kept(cache / "selfcheck-1.json").update({"fwd 128": "relative error 1.0", "fwd 64": ""})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status, text = said()
    assert status == 0 and "1 configs in 2 files, 0 of these kernels" in text
    assert "2, 1 failed" in text and "these are not used; please report them: fwd 128" in text
    assert "note: corrupt" in text


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TVCOMPILE_CACHE_DIR", str(tmp_path / "file"))
    status, text = said()
    assert status == 0 and "name another folder in TVCOMPILE_CACHE_DIR" in text


def test_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "doctor", lambda console: 7)
    assert __main__.main(["doctor"]) == 7
    assert __main__.main(["--help"]) == 0 and "tvcompile tune" in capsys.readouterr().out
    for wrong in ([], ["doctr"], ["doctor", "now"]):
        assert __main__.main(wrong) == 2 and "usage: tvcompile" in capsys.readouterr().err
