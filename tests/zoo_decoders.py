"""More decoders of the zoo, run in turn."""

from __future__ import annotations

from tests.zoo_base import BASE, DECODER, ENCODER, EXPERTS, MLA, SPECIAL, sliding_pair
from tests.zoo_entry import EAGER, Entry

SLIDING_FULL = ["sliding_attention", "full_attention"]
MOE = dict(DECODER, head_dim=16, moe_intermediate_size=32, num_experts=2, num_experts_per_tok=2)

DECODERS: tuple[Entry, ...] = (
    Entry("ministral", "MinistralForCausalLM", sliding_pair(head_dim=16, layer_types=SLIDING_FULL), 2),
    Entry("ministral3", "Ministral3ForCausalLM", dict(DECODER, head_dim=16), 2),
    Entry("qwen2_moe", "Qwen2MoeForCausalLM", dict(MOE, shared_expert_intermediate_size=32), 2),
    Entry("olmo3", "Olmo3ForCausalLM", sliding_pair(layer_types=SLIDING_FULL), 2),
    Entry("olmoe", "OlmoeForCausalLM", dict(DECODER, num_experts=2, num_experts_per_tok=2), 2),
    Entry("exaone4", "Exaone4ForCausalLM", sliding_pair(layer_types=SLIDING_FULL), 2),
    Entry("glm", "GlmForCausalLM", dict(DECODER, head_dim=16), 2),
    Entry(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        dict(
            DECODER,
            head_dim=16,
            moe_intermediate_size=32,
            n_routed_experts=2,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
        ),
        2,
    ),
    Entry("helium", "HeliumForCausalLM", dict(DECODER, head_dim=16), 2),
    Entry("arcee", "ArceeForCausalLM", DECODER, 2),
    Entry("apertus", "ApertusForCausalLM", DECODER, 2),
    Entry("ernie4_5", "Ernie4_5ForCausalLM", dict(DECODER, head_dim=16), 2),
    Entry("hunyuan", "HunYuanDenseV1ForCausalLM", dict(DECODER, head_dim=16), 2),
    Entry("seed_oss", "SeedOssForCausalLM", dict(DECODER, head_dim=16), 2),
    Entry("nanochat", "NanoChatForCausalLM", DECODER, 2),
    Entry("doge", "DogeForCausalLM", DECODER, 2),
    Entry("bitnet", "BitNetForCausalLM", DECODER, 2),
    Entry("granitemoe", "GraniteMoeForCausalLM", dict(DECODER, **EXPERTS), 2),
    Entry("phimoe", "PhimoeForCausalLM", dict(DECODER, router_jitter_noise=0.0, **EXPERTS), 2),
    Entry("minimax_m2", "MiniMaxM2ForCausalLM", dict(DECODER, head_dim=16, **EXPERTS), 2),
    Entry(
        "dots1",
        "Dots1ForCausalLM",
        dict(
            n_shared_experts=1,
            **dict(
                DECODER,
                head_dim=16,
                moe_intermediate_size=32,
                n_routed_experts=2,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
            ),
        ),
        2,
    ),
    Entry("openai_gpt", "OpenAIGPTLMHeadModel", dict(BASE, n_positions=64), 2, impls=EAGER),
    Entry("ctrl", "CTRLLMHeadModel", dict(SPECIAL, n_embd=64, n_layer=2, n_head=4, dff=96, n_positions=64), 2),
    Entry(
        "xlnet",
        "XLNetModel",
        dict(SPECIAL, d_model=64, n_layer=2, n_head=4, d_inner=96),
        2,
        "encoder",
        impls=EAGER,
        refused=2,
    ),
    Entry(
        "vaultgemma",
        "VaultGemmaForCausalLM",
        sliding_pair(head_dim=16, query_pre_attn_scalar=16, layer_types=SLIDING_FULL),
        2,
        impls=EAGER,
    ),
    Entry(
        "modernbert_decoder",
        "ModernBertDecoderForCausalLM",
        dict(ENCODER, local_attention=8, layer_types=SLIDING_FULL, cls_token_id=1, sep_token_id=2),
        2,
    ),
    Entry(
        "gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", dict(ENCODER, intermediate_multiple_size=1), 2, impls=EAGER
    ),
    Entry(
        "imagegpt",
        "ImageGPTModel",
        {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        2,
        impls=EAGER,
    ),
    Entry("lfm2", "Lfm2ForCausalLM", dict(DECODER, layer_types=["conv", "full_attention"]), 1),
    Entry(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        dict(DECODER, head_dim=16, layer_types=["full_attention", "full_attention"]),
        2,
    ),
    Entry("gemma4_text", "Gemma4ForCausalLM", sliding_pair(head_dim=16, layer_types=SLIDING_FULL), 2),
    Entry(
        "gemma3n",
        "Gemma3nForCausalLM",
        dict(
            sliding_pair(head_dim=16, layer_types=SLIDING_FULL),
            intermediate_size=96,
            hidden_size_per_layer_input=16,
            num_kv_shared_layers=0,
            vocab_size_per_layer_input=64,
            activation_sparsity_pattern=[0.0, 0.0],
            laurel_rank=8,
        ),
        2,
    ),
    Entry(
        "t5gemma",
        "T5GemmaForConditionalGeneration",
        {
            "encoder": sliding_pair(head_dim=16, layer_types=SLIDING_FULL),
            "decoder": sliding_pair(head_dim=16, layer_types=SLIDING_FULL),
        },
        6,
        "seq2seq",
        impls=EAGER,
    ),
    Entry(
        "minicpm3",
        "MiniCPM3ForCausalLM",
        dict(
            DECODER,
            num_key_value_heads=4,
            q_lora_rank=32,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=12,
        ),
        2,
    ),
    Entry(
        "youtu",
        "YoutuForCausalLM",
        dict(
            DECODER,
            num_key_value_heads=4,
            q_lora_rank=32,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=12,
        ),
        2,
    ),
    Entry("mimo_v2_flash", "MiMoV2FlashForCausalLM", dict(MOE, sliding_window=8), 2, impls=EAGER),
    Entry(
        "afmoe",
        "AfmoeForCausalLM",
        dict(MOE, sliding_window=8, layer_types=SLIDING_FULL, num_dense_layers=1, num_shared_experts=1),
        2,
    ),
    Entry(
        "longcat",
        "LongcatFlashForCausalLM",
        dict(MLA, num_layers=1, ffn_hidden_size=96, expert_ffn_hidden_size=32, zero_expert_num=0, moe_topk=2),
        2,
    ),
)
