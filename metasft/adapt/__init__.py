"""Adapting a model to examples: any start opened, several tasks adapted together, a user's own examples.

from metasft.adapt import adapt

adapt("checkpoints/meta_lora/adapter_step_3000", [{"prompt": "...", "response": "..."}, ...], "adapters/mine")
"""

from typing import Any

__all__ = ["adapt"]


def __getattr__(name: str) -> Any:
    # On first use: it imports torch, and most modules of this package are read without it.
    if name == "adapt":
        from metasft.adapt.own_tasks import adapt

        return adapt
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
