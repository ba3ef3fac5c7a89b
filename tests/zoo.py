"""The zoo: `transformers` model classes with tiny configs, and how many attentions each contains.

python -m tests.zoo [name ...]   sites expected and fused, refusals, tv's error beside eager's
--full                           every padding, inference and training, fp32 and bf16
--inductor                       with code generation
--census                         what Dynamo alone captures: graphs, anchors, graph breaks
"""

from __future__ import annotations

import sys
from typing import Any

from tests.zoo_entry import EAGER, SEQ, VOCAB, Entry

_SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **_SPECIAL)
_ENCODER = dict(_BASE, intermediate_size=96, max_position_embeddings=64)
_DECODER = dict(_ENCODER, num_key_value_heads=2)
_VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
}
_SEQ2SEQ = dict(
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
    max_position_embeddings=64,
    decoder_start_token_id=1,
    forced_eos_token_id=None,
    **_SPECIAL,
)
# All experts are chosen: a router that flips on a rounding error would drown every comparison.
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
_MLA = dict(
    _DECODER,
    num_key_value_heads=4,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=12,
    head_dim=8,
    moe_intermediate_size=32,
    n_routed_experts=2,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
_T5 = dict(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, **_SPECIAL)
_T5.update(decoder_start_token_id=1, relative_attention_num_buckets=8)
_T5.update(relative_attention_max_distance=16)
_CONV_AUDIO = dict(
    _BASE,
    intermediate_size=96,
    conv_dim=(16, 16),
    conv_kernel=(10, 3),
    conv_stride=(5, 2),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
)


def _sliding_pair(**more: Any) -> dict[str, Any]:
    return dict(_DECODER, sliding_window=8, **more)


ENTRIES: tuple[Entry, ...] = (
    # Decoders with rotary embeddings and grouped keys.
    Entry("llama", "LlamaForCausalLM", _DECODER, 2),
    Entry("mistral", "MistralForCausalLM", _sliding_pair(), 2),
    Entry("qwen2", "Qwen2ForCausalLM", _DECODER, 2),
    Entry("qwen3", "Qwen3ForCausalLM", dict(_DECODER, head_dim=16), 2),
    Entry("gemma", "GemmaForCausalLM", dict(_DECODER, head_dim=16), 2),
    Entry(
        "gemma2",
        "Gemma2ForCausalLM",
        _sliding_pair(head_dim=16, query_pre_attn_scalar=16),
        2,
        impls=EAGER,
    ),
    Entry(
        "gemma3",
        "Gemma3ForCausalLM",
        _sliding_pair(head_dim=16, layer_types=["sliding_attention", "full_attention"]),
        2,
    ),
    Entry("phi", "PhiForCausalLM", _DECODER, 2),
    Entry("phi3", "Phi3ForCausalLM", _sliding_pair(), 2),
    Entry("starcoder2", "Starcoder2ForCausalLM", _sliding_pair(), 2),
    Entry("cohere", "CohereForCausalLM", _DECODER, 2),
    Entry(
        "cohere2",
        "Cohere2ForCausalLM",
        _sliding_pair(head_dim=16, layer_types=["sliding_attention", "full_attention"]),
        2,
    ),
    Entry("olmo", "OlmoForCausalLM", _DECODER, 2),
    Entry("olmo2", "Olmo2ForCausalLM", _DECODER, 2),
    Entry("granite", "GraniteForCausalLM", dict(_DECODER, attention_multiplier=0.2), 2),
    Entry("glm4", "Glm4ForCausalLM", dict(_DECODER, head_dim=16), 2),
    Entry("stablelm", "StableLmForCausalLM", _DECODER, 2),
    Entry("persimmon", "PersimmonForCausalLM", _ENCODER, 2),
    Entry("nemotron", "NemotronForCausalLM", dict(_DECODER, head_dim=16), 2),
    Entry("smollm3", "SmolLM3ForCausalLM", dict(_DECODER, no_rope_layers=[1, 0]), 2),
    Entry("diffllama", "DiffLlamaForCausalLM", _DECODER, 4),
    # Multi-head latent attention: D differs from D_v, k is assembled in place.
    Entry("deepseek_v2", "DeepseekV2ForCausalLM", _MLA, 2),
    Entry("deepseek_v3", "DeepseekV3ForCausalLM", _MLA, 2),
    # Mixtures of experts, sinks, chunks.
    Entry("mixtral", "MixtralForCausalLM", dict(_sliding_pair(), **_EXPERTS), 2),
    Entry(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        dict(_DECODER, head_dim=16, moe_intermediate_size=32, num_experts=2, num_experts_per_tok=2),
        2,
    ),
    Entry("gpt_oss", "GptOssForCausalLM", dict(_sliding_pair(head_dim=16), **_EXPERTS), 2, impls=EAGER),
    Entry(
        "llama4",
        "Llama4ForCausalLM",
        dict(
            _DECODER,
            head_dim=16,
            intermediate_size_mlp=96,
            attention_chunk_size=8,
            moe_layers=[1],
            no_rope_layers=[1, 0],
            **_EXPERTS,
        ),
        2,
    ),
    # Older decoders: learned positions, partial rotary, ALiBi.
    Entry("gpt2", "GPT2LMHeadModel", dict(_BASE, n_positions=64), 2),
    Entry(
        "gpt_neo",
        "GPTNeoForCausalLM",
        dict(
            _BASE,
            max_position_embeddings=64,
            window_size=8,
            attention_types=[[["global", "local"], 1]],
        ),
        2,
        impls=EAGER,
    ),
    Entry("gpt_neox", "GPTNeoXForCausalLM", _ENCODER, 2),
    Entry("gptj", "GPTJForCausalLM", dict(_BASE, n_positions=64, rotary_dim=8), 2, impls=EAGER),
    Entry("gpt_bigcode", "GPTBigCodeForCausalLM", dict(_BASE, n_positions=64, multi_query=True), 2),
    Entry("codegen", "CodeGenForCausalLM", dict(_BASE, n_positions=64, rotary_dim=8), 2, impls=EAGER),
    Entry("opt", "OPTForCausalLM", dict(_ENCODER, ffn_dim=96, word_embed_proj_dim=64), 2),
    Entry("biogpt", "BioGptForCausalLM", _ENCODER, 2),
    Entry(
        "xglm",
        "XGLMForCausalLM",
        dict(
            _SPECIAL,
            d_model=64,
            num_layers=2,
            attention_heads=4,
            ffn_dim=96,
            max_position_embeddings=64,
        ),
        2,
        impls=EAGER,
    ),
    Entry("bloom", "BloomForCausalLM", dict(_BASE, n_layer=2, n_head=4), 2, impls=EAGER),
    Entry(
        "mpt",
        "MptForCausalLM",
        dict(_SPECIAL, d_model=64, n_heads=4, n_layers=2, max_seq_len=64),
        2,
        impls=EAGER,
    ),
    Entry(
        "falcon_alibi",
        "FalconForCausalLM",
        dict(_BASE, alibi=True, new_decoder_architecture=False, multi_query=True),
        2,
    ),
    Entry(
        "falcon",
        "FalconForCausalLM",
        dict(_BASE, alibi=False, num_kv_heads=2, new_decoder_architecture=True),
        2,
    ),
    # Encoders of text.
    Entry("bert", "BertModel", _ENCODER, 2, "encoder"),
    Entry("roberta", "RobertaModel", _ENCODER, 2, "encoder"),
    Entry(
        "distilbert",
        "DistilBertModel",
        dict(_BASE, hidden_dim=96, max_position_embeddings=64),
        2,
        "encoder",
    ),
    Entry("albert", "AlbertModel", dict(_ENCODER, embedding_size=32), 2, "encoder"),
    Entry("electra", "ElectraModel", dict(_ENCODER, embedding_size=32), 2, "encoder"),
    Entry(
        "mpnet",
        "MPNetModel",
        dict(_ENCODER, relative_attention_num_buckets=32),
        2,
        "encoder",
        impls=EAGER,
    ),
    Entry(
        "deberta_v2",
        "DebertaV2Model",
        dict(_ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
        2,
        "encoder",
        impls=EAGER,
        refused=2,
    ),
    Entry(
        "modernbert",
        "ModernBertModel",
        dict(
            _ENCODER,
            local_attention=8,
            layer_types=["full_attention", "sliding_attention"],
            cls_token_id=1,
            sep_token_id=2,
        ),
        2,
        "encoder",
    ),
    Entry(
        "esm",
        "EsmModel",
        dict(_ENCODER, mask_token_id=3, position_embedding_type="rotary"),
        2,
        "encoder",
    ),
    Entry("xlm_roberta", "XLMRobertaModel", _ENCODER, 2, "encoder"),
    Entry(
        "rembert",
        "RemBertModel",
        dict(_ENCODER, input_embedding_size=32, output_embedding_size=32),
        2,
        "encoder",
        impls=EAGER,
    ),
    Entry("roformer", "RoFormerModel", dict(_ENCODER, embedding_size=64), 2, "encoder", impls=EAGER),
    Entry("layoutlm", "LayoutLMModel", _ENCODER, 2, "encoder"),
    Entry(
        "squeezebert",
        "SqueezeBertModel",
        dict(_ENCODER, embedding_size=64),
        2,
        "encoder",
        impls=EAGER,
    ),
    # Encoder-decoders: encoder, decoder and cross attention each count.
    Entry("t5", "T5ForConditionalGeneration", _T5, 6, "seq2seq"),
    Entry("mt5", "MT5ForConditionalGeneration", _T5, 6, "seq2seq"),
    Entry("bart", "BartForConditionalGeneration", _SEQ2SEQ, 6, "seq2seq"),
    Entry("m2m100", "M2M100ForConditionalGeneration", _SEQ2SEQ, 6, "seq2seq"),
    Entry("pegasus", "PegasusForConditionalGeneration", _SEQ2SEQ, 6, "seq2seq"),
    Entry("marian", "MarianMTModel", _SEQ2SEQ, 6, "seq2seq"),
    Entry("blenderbot", "BlenderbotForConditionalGeneration", _SEQ2SEQ, 6, "seq2seq"),
    Entry(
        "whisper",
        "WhisperForConditionalGeneration",
        dict(_SEQ2SEQ, num_mel_bins=8, max_source_positions=SEQ, max_target_positions=64),
        6,
        "mel",
    ),
    # Vision.
    Entry("vit", "ViTModel", dict(_VISION, patch_size=8), 2, "image"),
    Entry("deit", "DeiTModel", dict(_VISION, patch_size=8), 2, "image"),
    Entry("dinov2", "Dinov2Model", dict(_VISION, patch_size=8), 2, "image"),
    Entry(
        "beit",
        "BeitModel",
        dict(_VISION, patch_size=8, use_relative_position_bias=True),
        2,
        "image",
    ),
    Entry(
        "swin",
        "SwinModel",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        4,
        "image",
    ),
    Entry(
        "swinv2",
        "Swinv2Model",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        4,
        "image",
        impls=EAGER,
    ),
    Entry("siglip_vision", "SiglipVisionModel", dict(_VISION, patch_size=8), 3, "image"),
    Entry("clip_vision", "CLIPVisionModel", dict(_VISION, patch_size=8), 2, "image"),
    Entry(
        "segformer",
        "SegformerModel",
        {
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "sr_ratios": [4, 2],
            "hidden_sizes": [16, 32],
            "num_attention_heads": [1, 2],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "mlp_ratios": [2, 2],
        },
        2,
        "image",
    ),
    # Text towers, audio, image and text together.
    Entry("clip_text", "CLIPTextModel", dict(_ENCODER), 2, "decoder"),
    Entry("siglip_text", "SiglipTextModel", dict(_ENCODER), 2, "encoder"),
    Entry("wav2vec2", "Wav2Vec2Model", _CONV_AUDIO, 2, "wave"),
    Entry("hubert", "HubertModel", _CONV_AUDIO, 2, "wave"),
    Entry(
        "blip",
        "BlipForConditionalGeneration",
        {
            "text_config": dict(_ENCODER, encoder_hidden_size=64),
            "vision_config": dict(_VISION, patch_size=8),
        },
        6,
        "image_text",
        impls=EAGER,
    ),
)

BY_NAME = {entry.name: entry for entry in ENTRIES}

if __name__ == "__main__":
    from tests.zoo_run import main

    sys.exit(main(sys.argv[1:], ENTRIES))
