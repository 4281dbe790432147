"""Floating-point operations of one training step, counted for what is actually trained.

A product of an [n, i] with an [i, j] matrix is 2 n i j operations. Per step, with n tokens in sequences of lengths L_s,
W the i x j matrices of the decoder layers, h = heads x head size and m output positions of a vocabulary V and width d:

    forward               sum over W of 2 n i j  +  layers x sum_s 4 L_s^2 h  +  2 m d V
    adapters, forward     sum over adapted W of 2 n r (i + j)
    backward to inputs    the same as the forward, without the first layer's W that read a frozen embedding
    backward to weights   the trained matrices only: all W and the output matrix, or 2 n r (i + j) for adapters

The usual 6 N per token is the case "all parameters trained, logits everywhere"; with a frozen base the backward to
weights falls away, and with logits at response positions so does most of the output layer. Attention is counted over
the full square, masked half included (as torch's counter does). Norms, activations, the softmax and the optimizer are
left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "tie_word_embeddings",
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    name: dict(zip(_KEYS, values, strict=True))
    for name, values in {
        "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
        "smollm2-360m": (960, 2560, 32, 15, 5, 49152, True),
        "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
        "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, True),
        "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256, False),
        "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256, False),
    }.items()
}
"""Name -> what the configuration of a model says of its matrices."""


@dataclass(frozen=True)
class ModelShape:
    """The matrices of a decoder-only language model.

    Attributes:
        layers: decoder layers.
        matrices: name -> (inputs, outputs) of the linear layers of one decoder layer.
        attention_width: query heads x head size.
        hidden: width of the output layer's input.
        vocabulary: outputs of the output layer.
        tied: the output matrix is the embedding matrix.
    """

    layers: int
    matrices: dict[str, tuple[int, int]]
    attention_width: int
    hidden: int
    vocabulary: int
    tied: bool = True

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """From a Hugging Face configuration of the Llama family (gated MLP, grouped queries)."""
        hidden, heads = config.hidden_size, config.num_attention_heads
        size = getattr(config, "head_dim", None) or hidden // heads
        queries, keys = heads * size, config.num_key_value_heads * size
        inner = config.intermediate_size
        return cls(
            layers=config.num_hidden_layers,
            matrices={
                "q_proj": (hidden, queries),
                "k_proj": (hidden, keys),
                "v_proj": (hidden, keys),
                "o_proj": (queries, hidden),
                "gate_proj": (hidden, inner),
                "up_proj": (hidden, inner),
                "down_proj": (inner, hidden),
            },
            attention_width=queries,
            hidden=hidden,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    @classmethod
    def of(cls, model: str) -> ModelShape:
        """Of a name of :data:`SHAPES`, a Hugging Face folder or a model of the hub.

        Raises:
            ValueError: there is no such model, or it is not of the Llama family.
        """
        if model in SHAPES:
            return cls.from_config(SimpleNamespace(**SHAPES[model]))
        from transformers import AutoConfig

        try:
            return cls.from_config(AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config())
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{model} is no model whose matrices can be counted ({str(error).splitlines()[0]}): give one of "
                f"{', '.join(SHAPES)}, or a Llama-like model's folder or name on the hub"
            ) from error

    @property
    def matrix_parameters(self) -> int:
        """Parameters of the decoder layers' matrices."""
        return self.layers * sum(i * j for i, j in self.matrices.values())

    @property
    def parameters(self) -> int:
        """Of the whole model, without those of norms and biases."""
        return self.matrix_parameters + self.hidden * self.vocabulary * (1 if self.tied else 2)

    @property
    def kept_per_token(self) -> int:
        """Numbers that a decoder layer keeps of a token for its backward: inputs and outputs of two norms, queries,
        keys, values, the attention's output, and gate, up, activated gate and product of the MLP."""
        queries, keys, inner = (self.matrices[name][1] for name in ("q_proj", "k_proj", "gate_proj"))
        return 4 * self.hidden + 2 * queries + 2 * keys + 4 * inner

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of a LoRA of ``rank`` on every linear layer of the decoder."""
        return self.layers * sum(rank * (i + j) for i, j in self.matrices.values())


@dataclass(frozen=True)
class StepFlops:
    """Operations of one forward and backward, by part."""

    forward: int
    backward_inputs: int
    backward_weights: int

    @property
    def total(self) -> int:
        return self.forward + self.backward_inputs + self.backward_weights


# The matrices that read the layer's input: in the first layer, with a frozen embedding, nothing needs their input's
# gradient.
_READ_LAYER_INPUT = ("q_proj", "k_proj", "v_proj")


def step_flops(
    shape: ModelShape, lengths: Sequence[int], output_positions: int, *, lora_rank: int | None = None
) -> StepFlops:
    """Operations of one forward and backward over a batch.

    Args:
        shape: the model.
        lengths: tokens of each sequence.
        output_positions: positions at which the output layer runs (response tokens, or all of them).
        lora_rank: rank of the adapters on all linear layers of the decoder over a frozen base; None = all parameters
        trained.
    """
    tokens = sum(lengths)
    base = 2 * tokens * shape.matrix_parameters
    attention = shape.layers * sum(4 * length**2 * shape.attention_width for length in lengths)
    output = 2 * output_positions * shape.hidden * shape.vocabulary
    if lora_rank is None:
        # Attention has no weights; the embedding's gradient is an addition of rows.
        return StepFlops(base + attention + output, base + 2 * attention + output, base + output)
    adapters = 2 * tokens * shape.adapter_parameters(lora_rank)
    reading = [shape.matrices[name] for name in _READ_LAYER_INPUT if name in shape.matrices]
    first = sum(i * j for i, j in reading)
    first_adapters = sum(lora_rank * i for i, _ in reading)
    return StepFlops(
        forward=base + attention + output + adapters,
        backward_inputs=base + 2 * attention + output + adapters - 2 * tokens * (first + first_adapters),
        backward_weights=adapters,
    )
