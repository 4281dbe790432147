"""Meta-learning trainers for language models on veRL: META-LORA, FOMAML-SFT and Reptile-SFT."""

__version__ = "0.1.0"
