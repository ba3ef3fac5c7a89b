"""Graph passes. LIFTS is their order."""

from .lift_attention import lift_attention
from .lift_moe import lift_moe

LIFTS = (lift_attention, lift_moe)
