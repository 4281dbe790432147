"""A random two-layer language model with a tokenizer of its own: what the trainers can be tried on in seconds.

python -m metasft.tiny_model DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

# ChatML with a default system prompt, as in the real models: veRL's dataset has to strip the prompt from every message
# but the first, and a template without one would leave that path untried.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ARCHITECTURES = ("llama", "qwen2")


def build_tiny_tokenizer():
    """One token per byte plus three special ones (259 in all): every text encodes, and decodes to itself."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny_model(
    output: Path | str,
    *,
    seed: int = 0,
    architecture: str = "llama",
    tie_word_embeddings: bool = True,
    hidden_size: int = 32,
    intermediate_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    vocab_size: int | None = None,
    initializer_range: float = 0.1,
) -> Path:
    """Write a random fp32 model and its tokenizer to ``output`` as a Hugging Face folder; takes about a second.

    The same arguments give the same weights, and torch's global random state is left as it was.

    Args:
        output: folder to write, created if missing.
        seed: of the weights.
        architecture: ``llama`` or ``qwen2`` (which adds biases to the attention projections).
        tie_word_embeddings: whether the output layer is the embedding matrix.
        vocab_size: rows of the embedding matrix; None for as many as the tokenizer has tokens.
        initializer_range: of the weights. 0.02, the usual value, is for hidden sizes in the thousands: at 32 the logits
            and gradients all but vanish.

    Returns:
        ``output`` as a Path.

    Raises:
        ValueError: unknown architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is '{architecture}': choose one of {', '.join(ARCHITECTURES)}")
    output = Path(output)
    tokenizer = build_tiny_tokenizer()
    config = AutoConfig.for_model(
        architecture,
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--untied", action="store_true", help="give the output layer weights of its own")
    arguments = parser.parse_args()
    written = build_tiny_model(
        arguments.output,
        seed=arguments.seed,
        architecture=arguments.architecture,
        tie_word_embeddings=not arguments.untied,
    )
    print(f"wrote {written}")
