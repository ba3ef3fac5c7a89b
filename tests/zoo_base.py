"""Config fields that the families of the zoo share; every model is two layers of width 64."""

from __future__ import annotations

from typing import Any

from tests.zoo_entry import VOCAB

SPECIAL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **SPECIAL)
ENCODER = dict(BASE, intermediate_size=96, max_position_embeddings=64)
DECODER = dict(ENCODER, num_key_value_heads=2)
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
}
SEQ2SEQ = dict(
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
    **SPECIAL,
)
# All experts are chosen: a router that flips on a rounding error would drown every comparison.
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
MLA = dict(
    DECODER,
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
T5 = dict(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, **SPECIAL)
T5.update(decoder_start_token_id=1, relative_attention_num_buckets=8)
T5.update(relative_attention_max_distance=16)
CONV_AUDIO = dict(
    BASE,
    intermediate_size=96,
    conv_dim=(16, 16),
    conv_kernel=(10, 3),
    conv_stride=(5, 2),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
)


def sliding_pair(**more: Any) -> dict[str, Any]:
    return dict(DECODER, sliding_window=8, **more)
