"""How veRL turns conversations into tokens."""

from verl.utils.tokenizer import normalize_token_ids

__all__ = ["normalize_token_ids"]
