"""A model run in two parts: its lower decoder layers, and those from there on."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from metasft.model.forward_pass import ForwardPass, LowerLayers, running
from metasft.model.lower_layers import decoder_layers, in_rows, watch_decoder_layers

IDS = torch.tensor([[5, 9, 2, 7, 7]])


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def logits(model, lower=None):
    with running(ForwardPass(lower=lower)):
        return model(input_ids=IDS, use_cache=False).logits


def returning_tuples(layers):
    """As some architectures' layers do."""
    for layer in layers:
        layer.forward = lambda hidden_states, *args, own=layer.forward, **kwargs: (own(hidden_states, *args, **kwargs),)


def test_two_parts_are_the_whole_and_the_lower_one_has_no_gradient(model):
    expected = logits(model)
    layers = decoder_layers(model)
    calls = []
    for number, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))
    watch_decoder_layers(layers)
    assert torch.equal(logits(model), expected) and calls == [0, 1]  # as it was, in whole passes
    lower = LowerLayers(1)
    logits(model, lower)
    assert calls == [0, 1, 0] and lower.found.shape == (1, 5, model.config.hidden_size)
    assert not lower.found.requires_grad
    found = logits(model, LowerLayers(1, lower.found))
    assert calls == [0, 1, 0, 1] and torch.equal(found, expected)
    found.sum().backward()
    assert layers[1].self_attn.q_proj.weight.grad.any() and layers[0].self_attn.q_proj.weight.grad is None


def test_layers_that_return_more_than_the_hidden_states(model):
    layers = decoder_layers(model)
    returning_tuples(layers)
    model.model.forward = lambda input_ids, **_: through(model, input_ids)
    watch_decoder_layers(layers)
    expected = logits(model)
    lower = LowerLayers(1)
    logits(model, lower)
    assert torch.equal(logits(model, LowerLayers(1, lower.found)), expected)


def through(model, input_ids):
    """The decoder's forward, for such layers."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    decoder = model.model
    hidden = decoder.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1])[None]
    rotary = decoder.rotary_emb(hidden, positions)
    for layer in decoder.layers:
        hidden, *_ = layer(hidden, position_embeddings=rotary, position_ids=positions)
    return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden))


def test_a_model_without_a_list_of_layers_says_so(model):
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM has no list of 3 decoder layers$"):
        decoder_layers(model)


def test_features_side_by_side():
    """Sequences that open alike share rows; rows that belong to none hold something."""
    one, other = torch.arange(6.0).view(3, 2), torch.tensor([[0.0, 1.0], [8.0, 9.0]])
    rows = in_rows([one, other], [[0, 1, 2], [0, 4]], 5)
    assert rows.shape == (5, 2)
    assert torch.equal(rows[[0, 1, 2, 4]], torch.cat([one, other[1:]]))
