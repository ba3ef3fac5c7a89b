"""The zoo: `transformers` model classes with tiny configs, and how many attentions each contains.

python -m tests.zoo [name ...]   sites expected and fused, refusals, tv's error beside eager's
--full                           every padding, inference and training, fp32 and bf16
--inductor                       with code generation
--census                         what Dynamo alone captures: graphs, anchors, graph breaks
"""

from __future__ import annotations

import sys

from tests.zoo_base import BASE, CONV_AUDIO, DECODER, ENCODER, EXPERTS, MLA, SEQ2SEQ, SPECIAL, T5, VISION, sliding_pair
from tests.zoo_decoders import DECODERS
from tests.zoo_entry import EAGER, SEQ, Entry
from tests.zoo_others import OTHERS

COMMON: tuple[Entry, ...] = (
    # Decoders with rotary embeddings and grouped keys.
    Entry("llama", "LlamaForCausalLM", DECODER, 2),
    Entry("mistral", "MistralForCausalLM", sliding_pair(), 2),
    Entry("qwen2", "Qwen2ForCausalLM", DECODER, 2),
    Entry("qwen3", "Qwen3ForCausalLM", dict(DECODER, head_dim=16), 2),
    Entry("gemma", "GemmaForCausalLM", dict(DECODER, head_dim=16), 2),
    Entry(
        "gemma2",
        "Gemma2ForCausalLM",
        sliding_pair(head_dim=16, query_pre_attn_scalar=16),
        2,
        impls=EAGER,
    ),
    Entry(
        "gemma3",
        "Gemma3ForCausalLM",
        sliding_pair(head_dim=16, layer_types=["sliding_attention", "full_attention"]),
        2,
    ),
    Entry("phi", "PhiForCausalLM", DECODER, 2),
    Entry("phi3", "Phi3ForCausalLM", sliding_pair(), 2),
    Entry("starcoder2", "Starcoder2ForCausalLM", sliding_pair(), 2),
    Entry("cohere", "CohereForCausalLM", DECODER, 2),
    Entry(
        "cohere2",
        "Cohere2ForCausalLM",
        sliding_pair(head_dim=16, layer_types=["sliding_attention", "full_attention"]),
        2,
    ),
    Entry("olmo", "OlmoForCausalLM", DECODER, 2),
    Entry("olmo2", "Olmo2ForCausalLM", DECODER, 2),
    Entry("granite", "GraniteForCausalLM", dict(DECODER, attention_multiplier=0.2), 2),
    Entry("glm4", "Glm4ForCausalLM", dict(DECODER, head_dim=16), 2),
    Entry("stablelm", "StableLmForCausalLM", DECODER, 2),
    Entry("persimmon", "PersimmonForCausalLM", ENCODER, 2),
    Entry("nemotron", "NemotronForCausalLM", dict(DECODER, head_dim=16), 2),
    Entry("smollm3", "SmolLM3ForCausalLM", dict(DECODER, no_rope_layers=[1, 0]), 2),
    Entry("diffllama", "DiffLlamaForCausalLM", DECODER, 4),
    # Multi-head latent attention: D differs from D_v, k is assembled in place.
    Entry("deepseek_v2", "DeepseekV2ForCausalLM", MLA, 2),
    Entry("deepseek_v3", "DeepseekV3ForCausalLM", MLA, 2),
    # Mixtures of experts, sinks, chunks.
    Entry("mixtral", "MixtralForCausalLM", dict(sliding_pair(), **EXPERTS), 2),
    Entry(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        dict(DECODER, head_dim=16, moe_intermediate_size=32, num_experts=2, num_experts_per_tok=2),
        2,
    ),
    Entry("gpt_oss", "GptOssForCausalLM", dict(sliding_pair(head_dim=16), **EXPERTS), 2, impls=EAGER),
    Entry(
        "llama4",
        "Llama4ForCausalLM",
        dict(
            DECODER,
            head_dim=16,
            intermediate_size_mlp=96,
            attention_chunk_size=8,
            moe_layers=[1],
            no_rope_layers=[1, 0],
            **EXPERTS,
        ),
        2,
    ),
    # Older decoders: learned positions, partial rotary, ALiBi.
    Entry("gpt2", "GPT2LMHeadModel", dict(BASE, n_positions=64), 2),
    Entry(
        "gpt_neo",
        "GPTNeoForCausalLM",
        dict(
            BASE,
            max_position_embeddings=64,
            window_size=8,
            attention_types=[[["global", "local"], 1]],
        ),
        2,
        impls=EAGER,
    ),
    Entry("gpt_neox", "GPTNeoXForCausalLM", ENCODER, 2),
    Entry("gptj", "GPTJForCausalLM", dict(BASE, n_positions=64, rotary_dim=8), 2, impls=EAGER),
    Entry("gpt_bigcode", "GPTBigCodeForCausalLM", dict(BASE, n_positions=64, multi_query=True), 2),
    Entry("codegen", "CodeGenForCausalLM", dict(BASE, n_positions=64, rotary_dim=8), 2, impls=EAGER),
    Entry("opt", "OPTForCausalLM", dict(ENCODER, ffn_dim=96, word_embed_proj_dim=64), 2),
    Entry("biogpt", "BioGptForCausalLM", ENCODER, 2),
    Entry(
        "xglm",
        "XGLMForCausalLM",
        dict(
            SPECIAL,
            d_model=64,
            num_layers=2,
            attention_heads=4,
            ffn_dim=96,
            max_position_embeddings=64,
        ),
        2,
        impls=EAGER,
    ),
    Entry("bloom", "BloomForCausalLM", dict(BASE, n_layer=2, n_head=4), 2, impls=EAGER),
    Entry(
        "mpt",
        "MptForCausalLM",
        dict(SPECIAL, d_model=64, n_heads=4, n_layers=2, max_seq_len=64),
        2,
        impls=EAGER,
    ),
    Entry(
        "falcon_alibi",
        "FalconForCausalLM",
        dict(BASE, alibi=True, new_decoder_architecture=False, multi_query=True),
        2,
    ),
    Entry(
        "falcon",
        "FalconForCausalLM",
        dict(BASE, alibi=False, num_kv_heads=2, new_decoder_architecture=True),
        2,
    ),
    # Encoders of text.
    Entry("bert", "BertModel", ENCODER, 2, "encoder"),
    Entry("roberta", "RobertaModel", ENCODER, 2, "encoder"),
    Entry(
        "distilbert",
        "DistilBertModel",
        dict(BASE, hidden_dim=96, max_position_embeddings=64),
        2,
        "encoder",
    ),
    Entry("albert", "AlbertModel", dict(ENCODER, embedding_size=32), 2, "encoder"),
    Entry("electra", "ElectraModel", dict(ENCODER, embedding_size=32), 2, "encoder"),
    Entry(
        "mpnet",
        "MPNetModel",
        dict(ENCODER, relative_attention_num_buckets=32),
        2,
        "encoder",
        impls=EAGER,
    ),
    Entry(
        "deberta_v2",
        "DebertaV2Model",
        dict(ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
        2,
        "encoder",
        impls=EAGER,
        refused=2,
    ),
    Entry(
        "modernbert",
        "ModernBertModel",
        dict(
            ENCODER,
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
        dict(ENCODER, mask_token_id=3, position_embedding_type="rotary"),
        2,
        "encoder",
    ),
    Entry("xlm_roberta", "XLMRobertaModel", ENCODER, 2, "encoder"),
    Entry(
        "rembert",
        "RemBertModel",
        dict(ENCODER, input_embedding_size=32, output_embedding_size=32),
        2,
        "encoder",
        impls=EAGER,
    ),
    Entry("roformer", "RoFormerModel", dict(ENCODER, embedding_size=64), 2, "encoder", impls=EAGER),
    Entry("layoutlm", "LayoutLMModel", ENCODER, 2, "encoder"),
    Entry(
        "squeezebert",
        "SqueezeBertModel",
        dict(ENCODER, embedding_size=64),
        2,
        "encoder",
        impls=EAGER,
    ),
    # Encoder-decoders: encoder, decoder and cross attention each count.
    Entry("t5", "T5ForConditionalGeneration", T5, 6, "seq2seq"),
    Entry("mt5", "MT5ForConditionalGeneration", T5, 6, "seq2seq"),
    Entry("bart", "BartForConditionalGeneration", SEQ2SEQ, 6, "seq2seq"),
    Entry("m2m100", "M2M100ForConditionalGeneration", SEQ2SEQ, 6, "seq2seq"),
    Entry("pegasus", "PegasusForConditionalGeneration", SEQ2SEQ, 6, "seq2seq"),
    Entry("marian", "MarianMTModel", SEQ2SEQ, 6, "seq2seq"),
    Entry("blenderbot", "BlenderbotForConditionalGeneration", SEQ2SEQ, 6, "seq2seq"),
    Entry(
        "whisper",
        "WhisperForConditionalGeneration",
        dict(SEQ2SEQ, num_mel_bins=8, max_source_positions=SEQ, max_target_positions=64),
        6,
        "mel",
    ),
    # Vision.
    Entry("vit", "ViTModel", dict(VISION, patch_size=8), 2, "image"),
    Entry("deit", "DeiTModel", dict(VISION, patch_size=8), 2, "image"),
    Entry("dinov2", "Dinov2Model", dict(VISION, patch_size=8), 2, "image"),
    Entry(
        "beit",
        "BeitModel",
        dict(VISION, patch_size=8, use_relative_position_bias=True),
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
    Entry("siglip_vision", "SiglipVisionModel", dict(VISION, patch_size=8), 3, "image"),
    Entry("clip_vision", "CLIPVisionModel", dict(VISION, patch_size=8), 2, "image"),
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
    Entry("clip_text", "CLIPTextModel", dict(ENCODER), 2, "decoder"),
    Entry("siglip_text", "SiglipTextModel", dict(ENCODER), 2, "encoder"),
    Entry("wav2vec2", "Wav2Vec2Model", CONV_AUDIO, 2, "wave"),
    Entry("hubert", "HubertModel", CONV_AUDIO, 2, "wave"),
    Entry(
        "blip",
        "BlipForConditionalGeneration",
        {
            "text_config": dict(ENCODER, encoder_hidden_size=64),
            "vision_config": dict(VISION, patch_size=8),
        },
        6,
        "image_text",
        impls=EAGER,
    ),
)

ENTRIES = (*COMMON, *DECODERS, *OTHERS)
BY_NAME = {entry.name: entry for entry in ENTRIES}

if __name__ == "__main__":
    from tests.zoo_run import main

    sys.exit(main(sys.argv[1:], ENTRIES))
