"""What a stranger installs and types: entry point, version, the commands of the documents."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tvcompile

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]


def installed() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("tvcompile")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tvcompile is not installed, only on the path (`make test` installs it)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_entry_point_is_found():
    installed()
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends")
    assert {e.value for e in entries if e.name == "tv"} == {"tvcompile.backend:tv"}
    assert "tv" in torch._dynamo.list_backends()


def test_a_program_needs_no_import_of_ours(tmp_path):
    installed()
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "def f(q, k, v):\n"
        "    return (q @ k.mT / 4.0).softmax(-1) @ v\n"
        "q, k, v = (torch.randn(1, 2, 16, 16) for _ in range(3))\n"
        "g = torch.compile(f, backend='tv', options={'tv.strict': True})\n"
        "torch.testing.assert_close(g(q, k, v), f(q, k, v))\n"
        "print('same')\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "same\n", done.stderr


def test_the_version_agrees():
    declared = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)[1]
    assert f"## {declared}" in read("CHANGELOG.md")
    assert getattr(tvcompile, "__version__", declared) == declared
    assert installed().version == declared


def test_the_commands_of_the_documents_exist():
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    for document in DOCUMENTS:
        text = read(document)
        named = set(re.findall(r"`make ([a-z]+)", text)) | set(re.findall(r"^    make ([a-z]+)", text, re.MULTILINE))
        assert named and named <= targets, (document, named - targets)


def test_the_files_the_documents_name_exist():
    for document in DOCUMENTS:
        for name in re.findall(r"`((?:tvcompile|examples|tests|tools)/[\w/.]+)`", read(document)):
            assert (ROOT / name).exists(), f"{document} names {name}"


def test_ci_calls_the_test_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "    make test\n" in read("README.md")
    assert re.search(r"^.*make test\b", script.read_text(), re.MULTILINE)


def make(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "CXX"}
    command = ["make", "test", f"VENV={folder / 'venv'}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)


def test_a_missing_compiler_is_one_clear_sentence(tmp_path):
    done = make(f"PYTHON={sys.executable}", "CXX=no-such-compiler", folder=tmp_path)
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0 and len(said) == 1
    assert said[0].startswith("tvcompile needs a C++ compiler, and `no-such-compiler` was not found")
    assert not (tmp_path / "venv").exists()


def test_an_old_python_is_one_clear_sentence(tmp_path):
    old = tmp_path / "python3"
    doctor = "import sys; sys.version_info = (3, 9, 1); sys.argv = [sys.argv[1]]"
    run = "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{doctor}; {run}" "$@"\n')
    old.chmod(0o755)
    done = make(f"PYTHON={old}", folder=tmp_path)
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0 and len(said) == 1, done.stderr
    assert said[0].startswith("tvcompile needs Python 3.10 or newer")
    assert not (tmp_path / "venv").exists()
