"""Meta-learning trainers for language models on veRL: META-LORA, FOMAML-SFT, Reptile-SFT and LoRA-ML."""

__version__ = "0.1.0"
