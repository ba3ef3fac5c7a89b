"""Graph passes. LIFTS is their order."""

from .lift_attention import lift_attention

LIFTS = (lift_attention,)
