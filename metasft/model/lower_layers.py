"""Running a model in two parts: the decoder layers below the adapted ones, and those from there on.

Where an inner loop adapts the top layers alone, what the layers below make of an example is the same in every inner
step. It is computed once, without a graph, and every inner step starts from there: of the lower layers' K forwards and
K backwards one forward is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from metasft.model.forward_pass import current


def base_model(module: Any) -> Any:
    """The transformers model inside an adapter, or the model itself."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def decoder_layers(model: Any) -> Sequence[torch.nn.Module]:
    """The decoder layers of a transformers model, in their order.

    Raises:
        ValueError: it has no list of as many layers as its configuration says.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers")


def watch_decoder_layers(layers: Sequence[torch.nn.Module]) -> None:
    """Let each layer do nothing in passes that it has no part in (:class:`~metasft.model.forward_pass.LowerLayers`).

    Without one in the pass the layers are as they were.
    """
    outputs: list[type] = []  # what the layers return, once one has run

    def watched(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            lower = current().lower
            if lower is None:
                return forward(hidden_states, *args, **kwargs)
            is_lower = number < lower.end
            if number == lower.end:
                if lower.given is None:
                    lower.found = hidden_states.detach()
                else:
                    hidden_states = lower.given
            if is_lower is (lower.given is None):
                result = forward(hidden_states, *args, **kwargs)
                outputs[:] = [type(result)]
                return result
            # Some layers return more than the hidden states; those that do not run leave that out.
            return hidden_states if not outputs or outputs[0] is not tuple else (hidden_states, None)

        return run

    for number, layer in enumerate(layers):
        layer.forward = watched(number, layer.forward)  # type: ignore[method-assign]


def in_rows(features: Sequence[torch.Tensor], places: Sequence[Sequence[int]], rows: int) -> torch.Tensor:
    """Sequences of features side by side, as one batch holds them: [rows, size].

    Args:
        features: of each sequence, [tokens or more, size].
        places: of each sequence, the row of each token; sequences may share rows.
        rows: how many there are; what none of the sequences has is arbitrary.
    """
    source = torch.zeros(rows, dtype=torch.long)
    start = 0
    for tokens, place in zip(features, places, strict=True):
        source[list(place)] = torch.arange(start, start + len(place))
        start += len(tokens)
    return torch.cat(list(features)).index_select(0, source.to(features[0].device))
