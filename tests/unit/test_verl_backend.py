"""Pieces of the engine that need no ranks."""

from __future__ import annotations

import random

import torch
from verl.utils import seqlen_balancing
from verl.workers.engine.utils import prepare_micro_batches

from metasft.backend.batches import count_micro_batches, make_batch

SETTINGS = {"use_dynamic_bsz": True, "pad_mode": "no_padding", "use_remove_padding": True}


def batch_of(lengths, **settings):
    examples = [
        {"input_ids": torch.full((n,), i), "position_ids": torch.arange(n), "loss_mask": torch.ones(n)}
        for i, n in enumerate(lengths)
    ]
    return make_batch(examples, [0] * len(lengths), [1.0] * len(lengths), {**SETTINGS, **settings})


def parts(batch, **kwargs):
    return prepare_micro_batches(batch, **kwargs)[1]


def test_every_rank_counts_the_micro_batches_that_the_ranks_would_agree_on(monkeypatch):
    """Against veRL's own: the largest count over the group, asked for with an all-reduce."""
    draw = random.Random(0)
    seen = set()
    for _ in range(50):
        examples, most_tokens = draw.randint(1, 6), draw.randint(40, 120)
        shares = [[draw.randint(1, 40) for _ in range(examples)] for _ in range(draw.choice((1, 2, 4)))]
        batches = [batch_of(share, max_token_len_per_gpu=most_tokens) for share in shares]
        needed = [len(parts(batch, same_micro_num_in_dp=False)) for batch in batches]

        def all_reduce(count, needed=needed, **_):
            assert count.item() in needed
            count.fill_(max(needed))

        monkeypatch.setattr(seqlen_balancing.dist, "all_reduce", all_reduce)
        least = count_micro_batches(shares, most_tokens)
        seen.add((min(needed), least))
        for batch in batches:
            monkeypatch.setattr(seqlen_balancing.dist, "is_initialized", lambda: True)
            expected = parts(batch, dp_group=object(), same_micro_num_in_dp=True)
            monkeypatch.setattr(seqlen_balancing.dist, "is_initialized", lambda: False)
            assert parts(batch, same_micro_num_in_dp=False, min_num_micro_batch=least) == expected
    assert any(fewest < most for fewest, most in seen), "ranks that need different numbers"
