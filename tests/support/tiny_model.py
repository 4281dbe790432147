"""The tiny random model of :mod:`metasft.tiny_model`, by the name that tests import it with."""

from metasft.tiny_model import ARCHITECTURES, CHAT_TEMPLATE, SPECIAL_TOKENS, build_tiny_model, build_tiny_tokenizer

__all__ = ["ARCHITECTURES", "CHAT_TEMPLATE", "SPECIAL_TOKENS", "build_tiny_model", "build_tiny_tokenizer"]
