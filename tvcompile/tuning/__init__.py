"""Which Config a kernel gets: what was measured on this machine, the shipped table, a closed formula; never a search.

    choose(Ask(Device.of(x.device), "fwd", "bfloat16", 128, 128, "causal", rows=4096)) -> [Choice, ...], best first

An Ask (attention.py, moe.py) says what a config is for. What was measured (store.py) serves the Asks of its `key`.
"""

from .lookup import Choice, choose, state

__all__ = ["Choice", "choose", "state"]
