"""The blocks of transformers itself, with either of its implementations that make one graph."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from tests.moe_spellings.base import FF, H, moe

ALL = {"hidden_size": H, "num_experts_per_tok": 2, "hidden_act": "silu"}


class Known(nn.Module):
    """A block of transformers. kind, layout, weigh: what its experts compute."""

    kind, layout, weigh, three, count = "swiglu", "chunk", "output", False, 6
    model, name, router = "", "", "gate"
    implementation = "grouped_mm"
    options: dict = {}

    def __init__(self):
        super().__init__()
        module = importlib.import_module(f"transformers.models.{self.model}.modeling_{self.model}")
        block = getattr(module, self.name)
        config = block.__init__.__annotations__.get("config") or self.config(module)
        config = getattr(module, config) if isinstance(config, str) else config
        self.config = config(**{**ALL, **self.options})
        self.config._experts_implementation = self.implementation
        self.block = block(self.config)
        for name, p in self.block.named_parameters():
            nn.init.normal_(p, std=1.5 / H**0.5 if name.startswith(self.router) else 0.2)

    @classmethod
    def config(cls, module):
        """The model's configuration, where the block does not say which."""
        return next(getattr(module, n) for n in dir(module) if n.endswith("Config") and n[0] not in "_P")

    def route(self, x):
        return getattr(self.block, self.router)(x)[-2:]

    def forward(self, x):
        """In float64, which torch._grouped_mm does not take, as `batched_mm`."""
        return self.block(x) if x.dtype != torch.float64 else self.by("batched_mm", x)

    def reference(self, x):
        """transformers' loop over the experts that were hit."""
        return self.by("eager", x)

    def by(self, implementation, x):
        self.config._experts_implementation = implementation
        try:
            return self.block(x)
        finally:
            self.config._experts_implementation = self.implementation


@moe()
@moe(implementation="batched_mm")
class Mixtral(Known):
    model, name = "mixtral", "MixtralSparseMoeBlock"
    options = {"num_local_experts": 6, "intermediate_size": FF, "router_jitter_noise": 0.0}


@moe()
@moe(implementation="batched_mm")
class GptOss(Known):
    model, name, router = "gpt_oss", "GptOssMLP", "router"
    kind, layout = "gpt_oss", "interleave"
    options = {"num_local_experts": 6, "intermediate_size": FF}


@moe()
@moe(implementation="batched_mm")
class Qwen2Moe(Known):
    model, name = "qwen2_moe", "Qwen2MoeSparseMoeBlock"
    options = {"num_experts": 6, "moe_intermediate_size": FF, "shared_expert_intermediate_size": 16}


@moe()
@moe(implementation="batched_mm")
class DeepseekV3(Known):
    model, name = "deepseek_v3", "DeepseekV3MoE"
    options = {"n_routed_experts": 6, "moe_intermediate_size": FF, "n_shared_experts": 2, "n_group": 3}
    options |= {"topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}


@moe()
class Olmoe(Known):
    model, name = "olmoe", "OlmoeSparseMoeBlock"
    options = {"num_experts": 6, "intermediate_size": FF}


@moe()
class GraniteMoe(Known):
    model, name, router = "granitemoe", "GraniteMoeMoE", "router"
    options = {"num_local_experts": 6, "intermediate_size": FF}


@moe()
class Ernie(Known):
    model, name = "ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock"
    options = {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": FF, "moe_num_shared_experts": 1}


@moe()
class Llama4(Known):
    model, name, router = "llama4", "Llama4TextMoe", "router"
    weigh = "input"
    options = {"num_local_experts": 6, "intermediate_size": FF, "intermediate_size_mlp": 16, "num_experts_per_tok": 1}

    def route(self, x):
        return self.block.router(x)[1].topk(1)

    @classmethod
    def config(cls, module):
        return module.Llama4TextConfig
