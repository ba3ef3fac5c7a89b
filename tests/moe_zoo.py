"""The zoo of mixtures of experts: `transformers` classes with tiny configs, and how many mixtures each contains.

python -m tests.moe_zoo [name ...]   attentions and mixtures expected and fused, refusals, tv's error beside eager's
--full                               every implementation, inference and training, fp32 and bf16
--inductor                           with code generation
--census                             what Dynamo alone captures: graphs, breaks, products

Two of four experts are chosen in float32. In bfloat16 eager itself chooses otherwise than float64 does, which would
drown every comparison: there all experts are chosen.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any

import torch

from tests.zoo_base import BASE, DECODER, MLA, SEQ2SEQ, SPECIAL, T5, sliding_pair
from tests.zoo_entry import Entry
from tests.zoo_run import Case

# How the library computes experts: its default, gathered weights, its loop (eleven graphs and more).
BY_SWITCH = ("grouped_mm", "batched_mm", "eager")
# Classes without the switch: `dense`, all experts in one graph; `loop`, a graph break for each expert.
DENSE, LOOP = ("dense",), ("loop",)
FUSABLE = ("grouped_mm", "batched_mm", "dense")


@dataclasses.dataclass(frozen=True)
class MoeEntry(Entry):
    """`sites` attentions and `moes` mixtures; impls are experts implementations.

    few, every   config fields: two of four experts are chosen, all are
    attention    the attention implementation
    """

    moes: int = 2
    few: dict[str, Any] = dataclasses.field(default_factory=dict)
    every: dict[str, Any] = dataclasses.field(default_factory=dict)
    impls: tuple[str, ...] = BY_SWITCH
    attention: str = "sdpa"

    def model(self, impl: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        chosen = self.few if dtype == torch.float32 else self.every
        plain = Entry(self.name, self.cls, {**self.config, **chosen}, self.sites)
        model = plain.model(self.attention, dtype)
        if impl in BY_SWITCH:
            model.set_experts_implementation(impl)
        return model


def moe(name: str, cls: str, config: dict, number: str = "num_experts", **more: Any) -> MoeEntry:
    """An entry whose config holds the number of experts under `number`."""
    sites = more.pop("sites", 2)
    few, every = more.pop("few", {number: 4}), more.pop("every", {number: 2})
    return MoeEntry(name, cls, config, sites, few=few, every=every, **more)


def dbrx_experts(count: int) -> dict[str, Any]:
    fields = {"ffn_hidden_size": 96, "moe_num_experts": count, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}}
    return {"ffn_config": fields}


LOCAL = "num_local_experts"
HEAD = dict(DECODER, head_dim=16)
TOP2 = dict(HEAD, num_experts_per_tok=2)
NARROW = dict(TOP2, moe_intermediate_size=32)
GROUPED = {
    "few": {"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    "every": {"n_routed_experts": 2, "n_group": 1, "topk_group": 1},
}
ROUTED = dict(NARROW, n_shared_experts=1, first_k_dense_replace=1)
LATENT = {k: v for k, v in MLA.items() if k not in ("n_routed_experts", "n_group", "topk_group")}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}

ENTRIES: tuple[MoeEntry, ...] = (
    moe("mixtral", "MixtralForCausalLM", dict(sliding_pair(), num_experts_per_tok=2), LOCAL),
    moe(
        "gpt_oss", "GptOssForCausalLM", dict(sliding_pair(head_dim=16), num_experts_per_tok=2), LOCAL, attention="eager"
    ),
    moe("qwen2_moe", "Qwen2MoeForCausalLM", dict(NARROW, shared_expert_intermediate_size=32)),
    moe("qwen3_moe", "Qwen3MoeForCausalLM", NARROW),
    moe("qwen3_moe_norm", "Qwen3MoeForCausalLM", dict(NARROW, norm_topk_prob=True)),
    moe("olmoe", "OlmoeForCausalLM", dict(DECODER, num_experts_per_tok=2)),
    moe("flex_olmo", "FlexOlmoForCausalLM", dict(DECODER, num_experts_per_tok=2)),
    moe("granitemoe", "GraniteMoeForCausalLM", dict(DECODER, num_experts_per_tok=2), LOCAL),
    moe(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        dict(DECODER, num_experts_per_tok=2, shared_intermediate_size=32),
        LOCAL,
    ),
    moe(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        dict(
            DECODER,
            num_experts_per_tok=2,
            shared_intermediate_size=32,
            layer_types=["attention", "attention"],
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_d_state=16,
        ),
        LOCAL,
    ),
    moe("deepseek_v2", "DeepseekV2ForCausalLM", dict(LATENT, topk_method="greedy"), moes=1, **GROUPED),
    moe("deepseek_v3", "DeepseekV3ForCausalLM", LATENT, moes=1, **GROUPED),
    moe("glm4_moe", "Glm4MoeForCausalLM", ROUTED, moes=1, **GROUPED),
    moe("glm4_moe_lite", "Glm4MoeLiteForCausalLM", dict(LATENT, **SPARSE), moes=1, **GROUPED),
    moe("dots1", "Dots1ForCausalLM", ROUTED, moes=1, **GROUPED),
    moe("solar_open", "SolarOpenForCausalLM", dict(NARROW, n_shared_experts=1), **GROUPED),
    moe("mistral4", "Mistral4ForCausalLM", dict(LATENT, first_k_dense_replace=0), **GROUPED),
    moe("exaone_moe", "ExaoneMoeForCausalLM", dict(NARROW, sliding_window=8, num_shared_experts=1, **SPARSE), moes=1),
    moe("hy_v3", "HYV3ForCausalLM", dict(NARROW, num_shared_experts=1, **SPARSE), moes=1),
    moe("hunyuan_moe", "HunYuanMoEV1ForCausalLM", dict(HEAD, moe_topk=2)),
    moe(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        dict(HEAD, moe_intermediate_size=32, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=0),
        "moe_num_experts",
    ),
    moe("phimoe", "PhimoeForCausalLM", dict(DECODER, num_experts_per_tok=2, router_jitter_noise=0.0), LOCAL),
    moe("minimax", "MiniMaxForCausalLM", dict(TOP2, layer_types=["full_attention"] * 2), LOCAL),
    moe("minimax_m2", "MiniMaxM2ForCausalLM", TOP2, LOCAL),
    moe(
        "jamba",
        "JambaForCausalLM",
        dict(
            DECODER,
            num_experts_per_tok=2,
            attn_layer_period=1,
            attn_layer_offset=0,
            expert_layer_period=1,
            expert_layer_offset=0,
            use_mamba_kernels=False,
        ),
    ),
    moe(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        dict(NARROW, shared_expert_intermediate_size=32, layer_types=["full_attention"] * 2),
    ),
    moe(
        "qwen3_5_moe",
        "Qwen3_5MoeForCausalLM",
        dict(NARROW, shared_expert_intermediate_size=32, layer_types=["full_attention"] * 2),
    ),
    moe(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        dict(NARROW, num_dense_layers=1, layer_types=["conv", "full_attention"]),
        sites=1,
        moes=1,
    ),
    moe("mellum", "MellumForCausalLM", dict(NARROW, sliding_window=8)),
    moe(
        "laguna",
        "LagunaForCausalLM",
        dict(NARROW, sliding_window=8, shared_expert_intermediate_size=32, **SPARSE),
        moes=1,
    ),
    moe(
        "afmoe",
        "AfmoeForCausalLM",
        dict(
            NARROW,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            num_dense_layers=1,
            num_shared_experts=1,
        ),
        moes=1,
    ),
    moe(
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        dict(TOP2, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    ),
    moe(
        "nemotron_h",
        "NemotronHForCausalLM",
        dict(
            {k: v for k, v in NARROW.items() if k != "num_hidden_layers"},
            layers_block_type=["attention", "moe", "moe"],
            moe_shared_expert_intermediate_size=32,
            use_mamba_kernels=False,
        ),
        sites=1,
        **GROUPED,
    ),
    # Classes without the switch.
    moe(
        "llama4",
        "Llama4ForCausalLM",
        dict(
            HEAD,
            intermediate_size_mlp=96,
            attention_chunk_size=8,
            moe_layers=[0, 1],
            no_rope_layers=[1, 0],
            num_experts_per_tok=1,
        ),
        every={LOCAL: 1},
        few={LOCAL: 4},
        impls=DENSE,
    ),
    moe(
        "dbrx",
        "DbrxForCausalLM",
        dict(
            SPECIAL,
            d_model=64,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ),
        few=dbrx_experts(4),
        every=dbrx_experts(2),
        impls=LOOP,
    ),
    moe(
        "jetmoe",
        "JetMoeForCausalLM",
        dict(
            BASE,
            num_key_value_heads=2,
            kv_channels=16,
            intermediate_size=96,
            max_position_embeddings=64,
            num_experts_per_tok=2,
        ),
        LOCAL,
        attention="eager",
        impls=LOOP,
    ),
    moe(
        "longcat",
        "LongcatFlashForCausalLM",
        dict(LATENT, num_layers=1, ffn_hidden_size=96, expert_ffn_hidden_size=32, zero_expert_num=0, moe_topk=2),
        "n_routed_experts",
        moes=1,
        impls=LOOP,
    ),
    moe(
        "switch",
        "SwitchTransformersForConditionalGeneration",
        dict(
            T5, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, router_jitter_noise=0.0
        ),
        sites=6,
        kind="seq2seq",
        every={"num_experts": 1},
        impls=LOOP,
        attention="eager",
    ),
    moe(
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        dict(SEQ2SEQ, encoder_sparse_step=2, decoder_sparse_step=2, encoder_layerdrop=0.0, decoder_layerdrop=0.0),
        sites=6,
        kind="seq2seq",
        impls=LOOP,
        attention="eager",
    ),
)
BY_NAME = {entry.name: entry for entry in ENTRIES}


def cases(entry: MoeEntry, full: bool) -> list[Case]:
    """The full cross of an entry, or per implementation that is one graph inference and training in float32."""
    found = []
    for impl in entry.impls:
        if full:
            found += [
                Case(entry, impl, "", *how) for how in itertools.product((False, True), (torch.float32, torch.bfloat16))
            ]
        elif impl in FUSABLE:
            found += [Case(entry, impl), Case(entry, impl, "", True)]
        else:
            found.append(Case(entry, impl))
    return found


def counts(sites: list[str]) -> tuple[int, int]:
    """(attentions, mixtures) among the specs of a report's sites."""
    moes = sum(spec.startswith("act =") for spec in sites)
    return len(sites) - moes, moes


def expected(case: Case) -> tuple[int, int]:
    """(attentions, mixtures) that must be fused."""
    entry = case.entry
    return entry.sites, entry.moes if case.impl in FUSABLE else 0


if __name__ == "__main__":
    from tests.moe_zoo_run import main

    sys.exit(main(sys.argv[1:]))
