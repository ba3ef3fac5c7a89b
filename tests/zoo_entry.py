"""A zoo entry: a `transformers` class with a tiny config, its inputs and its attention count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

BOTH = ("eager", "sdpa")
EAGER = ("eager",)
SEQ = 24  # longer than every window and chunk of the table, so that all of them bite
VOCAB = 64


@dataclass(frozen=True)
class Entry:
    """One model class: `sites` attentions in one forward; `refused` of them truly cannot fuse."""

    name: str
    cls: str
    config: dict[str, Any]
    sites: int
    kind: str = "decoder"  # decoder | encoder | seq2seq | image | wave | mel | image_text
    impls: tuple[str, ...] = BOTH
    refused: int = 0

    @property
    def fusable(self) -> int:
        """Sites that must be fused."""
        return self.sites - self.refused

    @property
    def pads(self) -> tuple[str, ...]:
        """Padding sides that this class of inputs knows; "" is none."""
        sides = {"decoder": ("", "left", "right"), "encoder": ("", "right", "left")}
        return sides.get(self.kind, ("", "right") if self.kind in ("seq2seq", "wave") else ("",))

    def model(self, impl: str = "eager", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The model: seeded random weights, no dropout, tables spread so that they matter."""
        cls = getattr(transformers, self.cls)
        config = cls.config_class(**self.config)
        _no_dropout(config)
        torch.manual_seed(0)
        model = cls._from_config(config, attn_implementation=impl, dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise.to(dtype), alpha=0.1 if parameter.ndim > 1 else 0.02)
        return model

    def inputs(self, batch: int = 2, seq: int = SEQ, pad: str = "") -> dict[str, torch.Tensor]:
        """Keyword arguments of forward; `pad` names the side on which sequences are padded."""
        return INPUTS[self.kind](self, torch.Generator().manual_seed(2), batch, seq, pad)


def _no_dropout(config: Any) -> None:
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and ("drop" in key or key.startswith("mask_")):
            setattr(config, key, 0.0)
        elif isinstance(value, transformers.PreTrainedConfig):
            _no_dropout(value)


def _mask(batch: int, seq: int, pad: str) -> dict[str, torch.Tensor]:
    if not pad:
        return {}
    mask = torch.ones(batch, seq, dtype=torch.long)
    for row in range(batch):
        hidden = 5 - 3 * (row % 2)
        mask[row, slice(0, hidden) if pad == "left" else slice(seq - hidden, None)] = 0
    return {"attention_mask": mask}


def _ids(generator: torch.Generator, batch: int, seq: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, seq), generator=generator)


def _tokens(entry, generator, batch, seq, pad):
    return {"input_ids": _ids(generator, batch, seq), **_mask(batch, seq, pad)}


def _seq2seq(entry, generator, batch, seq, pad):
    decoder = _ids(generator, batch, seq - 7)
    return {**_tokens(entry, generator, batch, seq, pad), "decoder_input_ids": decoder}


def _image(entry, generator, batch, seq, pad):
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}


def _wave(entry, generator, batch, seq, pad):
    wave = torch.randn(batch, 10 * seq + 12, generator=generator)
    return {"input_values": wave, **_mask(batch, wave.shape[1], pad)}


def _mel(entry, generator, batch, seq, pad):
    mel = torch.randn(batch, 8, 2 * seq, generator=generator)
    return {"input_features": mel, "decoder_input_ids": _ids(generator, batch, seq - 7)}


def _image_text(entry, generator, batch, seq, pad):
    return {
        **_tokens(entry, generator, batch, seq, pad),
        **_image(entry, generator, batch, seq, pad),
    }


INPUTS = {
    "decoder": _tokens,
    "encoder": _tokens,
    "seq2seq": _seq2seq,
    "image": _image,
    "wave": _wave,
    "mel": _mel,
    "image_text": _image_text,
}
