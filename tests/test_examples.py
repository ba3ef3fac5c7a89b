"""The examples and the demo run, at tiny sizes, and report what they fused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

# Example -> what its fused line must say. Sizes are those of TV_EXAMPLES=quick.
SPECS = {
    "causal": ["scale=0.125", "keep = kv <= q"],
    "sliding_window": ["scale=0.125", "keep = kv <= q & q - kv < 32"],
    "gqa": ["keep = kv <= q"],
    "alibi_softcap": ["score = ", "tanh", "keep = kv <= q"],
    "sinks": ["keep = kv <= q", "sink = "],
    "document_mask": ["keep = ", "ids", "kv <= q"],
    "train_decoder": ["keep = kv <= q"],
}

# The same for mixtures of experts, of which each example fuses one; a training also fuses its attention.
MOE_SPECS = {
    "mixtral": ["act = g*sigmoid(g)*u", "layout=chunk"],
    "switch_capacity": ["act = relu(u)"],
    "deepseek_router": ["act = g*sigmoid(g)*u", "layout=separate"],
    "train_moe": ["act = g*sigmoid(g)*u", "layout=chunk"],
    "export": ["act = u*sigmoid(u)"],
}
PROGRAMS = {**SPECS, **MOE_SPECS}
LONG = ("train_moe",)
OTHER_ENTRIES = ("export",)  # than torch.compile(backend="tv"), so that they import us


def run(name: str, **variables: str) -> str:
    environment = {**os.environ, "TV_EXAMPLES": "quick", "OMP_NUM_THREADS": "1", **variables}
    # Also where the package lies beside the tests and is not installed.
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def fused_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("fused ")]


def test_every_example_is_tested():
    programs = {file.stem for file in EXAMPLES.glob("*.py") if not file.stem.startswith("_")}
    assert programs == set(PROGRAMS) | {"demo"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_example_is_short_and_has_a_main(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert "def main() -> None:" in text
    if name not in LONG:
        assert text.count("\n") < 80
        assert ("tvcompile" in text.split('"""', 2)[2]) == (name in OTHER_ENTRIES)


@pytest.mark.parametrize("name", SPECS)
def test_an_example_runs_and_reports_what_it_fused(name):
    output = run(name)
    lines = fused_lines(output)
    assert lines, output
    for words in SPECS[name]:
        assert all(words in line for line in lines), output


@pytest.mark.parametrize("name", MOE_SPECS)
def test_an_example_of_experts_runs_and_reports_what_it_fused(name):
    output = run(name)
    lines = [line for line in fused_lines(output) if "act = " in line]
    assert len(lines) == 1, output
    for words in MOE_SPECS[name]:
        assert words in lines[0], output


def tiny_encoder(folder: Path) -> Path:
    """A BERT of two layers with random weights, and a tokenizer of letters."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_the_demo_runs_with_a_model_of_the_users_own(tmp_path):
    output = run("demo", MODEL=str(tiny_encoder(tmp_path / "own-model")))
    assert "own-model embeds" in output
    first, second, third = split_jobs(output)
    for part in (first, second, third):
        assert fused_lines(part), output
    for words in ("keep = kv <= q & q - kv < 8 & ", "empty=mean"):
        assert all(words in line for line in fused_lines(second) + fused_lines(third)), output


def test_the_demo_says_what_it_expects_of_a_model(tmp_path):
    environment = {**os.environ, "MODEL": str(tmp_path / "none"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(EXAMPLES / "demo.py")], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "expected a folder with its config" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def split_jobs(output: str) -> list[str]:
    """The output of jobs (a), (b) and (c)."""
    marks = [output.index(f"({letter}) ") for letter in "abc"]
    return [output[i:j] for i, j in zip(marks, [*marks[1:], len(output)])]
