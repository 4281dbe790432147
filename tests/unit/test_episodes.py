"""The episode sampler: without replacement, seeded, resumable."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metasft.data.episodes import EpisodeSampler, ShuffledStream


def sampler(seed=1, tasks=("a", "b", "c", "d", "e"), support=10, query=6, **changes):
    arguments = {"num_inner_steps": 2, "inner_batch_size": 2, "query_batch_size": 3, "meta_batch_size": 4, **changes}
    return EpisodeSampler({t: support for t in tasks}, {t: query for t in tasks}, seed=seed, **arguments)


@given(size=st.integers(1, 40), takes=st.lists(st.integers(1, 40), min_size=1, max_size=20), seed=st.text(max_size=5))
@settings(max_examples=200, deadline=None)
def test_a_take_never_repeats_an_item_and_every_pass_covers_the_set(size, takes, seed):
    stream, drawn = ShuffledStream(size, seed), []
    for count in takes:
        taken = stream.take(count)
        assert len(taken) == count and set(taken) <= set(range(size))
        if count <= size:
            assert len(set(taken)) == count
        drawn += taken
    counts = [drawn.count(i) for i in range(size)]
    assert max(counts) - min(counts) <= 2  # one pass, and at most one item held back at each of its ends


def test_passes_are_shuffled_anew():
    stream = ShuffledStream(50, "seed")
    first, second = stream.take(50), stream.take(50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first != tuple(range(50))


def test_episodes_advance_through_the_sets():
    """The trap: iterators made anew for every meta-step, so that a task always sees its first batch."""
    draws = sampler(tasks=("only",), meta_batch_size=1)
    support, query = [], []
    for _ in range(5):
        (episode,) = draws.next_meta_batch()
        support += [i for batch in episode.support_batches for i in batch]
        query += episode.query_batch
    assert sorted(support) == sorted([*range(10), *range(10)])
    assert len(set(query[:6])) == 6


def test_tasks_are_drawn_without_replacement_while_tasks_last():
    draws = sampler()
    seen = []
    for _ in range(5):
        tasks = [episode.task for episode in draws.next_meta_batch()]
        assert len(set(tasks)) == 4
        seen += tasks
    assert sorted(seen) == sorted(["a", "b", "c", "d", "e"] * 4)
    more = sampler(tasks=("a", "b"), meta_batch_size=5).next_meta_batch()
    assert {e.task for e in more} == {"a", "b"}
    first_a, second_a = [e for e in more if e.task == "a"][:2]
    assert first_a.support_batches != second_a.support_batches


def test_same_seed_same_episodes_other_seed_others():
    def draw(seed):
        draws = sampler(seed)
        return [draws.next_meta_batch() for _ in range(6)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_an_episode_cycles_its_shots():
    """As an adaptation at test time: every shot once before any comes again; the next episode has other shots."""
    draws = sampler(num_inner_steps=4, episode_shots=(3, 5), support=20)
    counts, last = set(), {}
    for _ in range(20):
        for episode in draws.next_meta_batch():
            drawn = [row for batch in episode.support_batches for row in batch]
            shots = set(drawn)
            counts.add(len(shots))
            assert all(len(set(batch)) == 2 for batch in episode.support_batches) and len(drawn) == 8
            assert {drawn.count(row) for row in shots} <= {1, 2, 3} and set(drawn[: len(shots) - 1]) <= shots
            assert len(set(drawn[: len(shots) // 2 * 2])) == len(shots) // 2 * 2
            if len(last.get(episode.task, ())) + len(shots) <= 20:
                last[episode.task] = last.get(episode.task, set()) | shots
    assert counts == {3, 4, 5} and min(map(len, last.values())) >= 16  # over a pass, other shots each time
    (batches,) = {e.support_batches[0] for e in sampler(episode_shots=(1, 1), tasks=["a"]).next_meta_batch()[:1]}
    assert len(batches) == 1  # a batch is no larger than the shots


@given(steps=st.integers(0, 12), more=st.integers(1, 6), shots=st.sampled_from([(0, 0), (1, 7)]))
@settings(max_examples=50, deadline=None)
def test_resumed_sampler_continues_exactly(steps, more, shots):
    one = sampler(episode_shots=shots)
    for _ in range(steps):
        one.next_meta_batch()
    state = json.loads(json.dumps(one.state_dict()))  # plain data, as a checkpoint holds it
    two = sampler(episode_shots=shots)
    two.load_state_dict(state)
    assert [one.next_meta_batch() for _ in range(more)] == [two.next_meta_batch() for _ in range(more)]


def test_resume_with_other_tasks_or_sizes_is_refused():
    state = sampler().state_dict()
    with pytest.raises(ValueError, match=r"a, b, c, d, e.*a, b"):
        sampler(tasks=("a", "b"), meta_batch_size=2).load_state_dict(state)
    with pytest.raises(ValueError, match="10 items but now has 12"):
        sampler(support=12).load_state_dict(state)
    with pytest.raises(ValueError, match="the resume state of the examples drawn is damaged"):
        sampler().load_state_dict({**state, "drawn": -1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"support": 1}, "1 support examples"), ({"query": 2}, "2 query examples"), ({"tasks": ()}, "no task")],
)
def test_sets_smaller_than_a_batch_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        sampler(**changes)


def test_no_query_set_when_none_is_asked_for():
    draws = EpisodeSampler(
        {"a": 4}, {}, num_inner_steps=2, inner_batch_size=2, query_batch_size=0, meta_batch_size=1, seed=0
    )
    assert draws.next_meta_batch()[0].query_batch == ()


def test_a_query_set_that_follows_the_support_set_shares_no_example_with_it():
    sizes = {"support_sizes": {"a": 10}, "query_sizes": {"a": 6}}
    batches = {"num_inner_steps": 2, "inner_batch_size": 3, "query_batch_size": 4, "meta_batch_size": 1, "seed": 1}
    apart, one = EpisodeSampler(**sizes, **batches), EpisodeSampler(**sizes, query_starts={"a": 10}, **batches)
    support, query = set(), set()
    for number in range(8):
        (episode,), (other,) = one.next_meta_batch(), apart.next_meta_batch()
        assert episode.support_batches == other.support_batches
        assert episode.query_batch == tuple(10 + index for index in other.query_batch)
        support.update(*episode.support_batches)
        query.update(episode.query_batch)
        if number == 3:
            state = one.state_dict()
            one = EpisodeSampler(**sizes, query_starts={"a": 10}, **batches)
            one.load_state_dict(state)
    assert support == set(range(10)) and query == set(range(10, 16))


def test_length_is_one_pass_over_the_support_sets():
    assert len(sampler()) == -(-5 * 10 // (4 * 2 * 2))
    assert len(sampler(num_inner_steps=0)) == -(-5 * 6 // (4 * 3))
