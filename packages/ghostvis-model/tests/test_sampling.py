"""Choosing tokens: filters keep what their definition says, and a request's numbers are its own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostvis_model.sampling import SamplerRows, Sampling, SamplingError, mode_of, sub_seed, uniforms

VOCABULARY = 40


def rows_of(batch, forbidden=(), context=64):
    rows = SamplerRows(len(batch), VOCABULARY, context, forbidden, torch.device("cpu"))
    rows.fill(range(len(batch)), batch, [one.seed or 0 for one in batch], [[1, 2]] * len(batch))
    return rows


def choose(logits, batch, **extra):
    return rows_of(batch, **extra).choose(logits.clone(), slice(0, len(batch)), mode_of(batch))


def kept(logits, one):
    """Which tokens the filters leave, by their definitions on sorted probabilities (float64)."""
    share = (logits.double() / one.temperature).softmax(-1)
    order = share.argsort(descending=True).tolist()
    if one.top_k is not None:
        order = order[: one.top_k]
    total, mass = sum(share[i].item() for i in order), 0.0
    inside = []
    for token in order:
        if mass < one.top_p:
            inside.append(token)
        mass += share[token].item() / total
    return {token for token in inside if share[token] >= one.min_p * share.max()}


def random_logits(count, seed=0):
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize(
    "one",
    [
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=0.7, top_p=0.8),
        Sampling(temperature=2.0, min_p=0.2),
        Sampling(temperature=1.5, top_k=12, top_p=0.7, min_p=0.05),
        Sampling(temperature=1.0),
    ],
)
def test_exactly_the_tokens_that_the_filters_leave_are_drawn(one):
    logits = random_logits(1)
    batch = [Sampling(**{**one.__dict__, "seed": seed}) for seed in range(4000)]
    tokens, _ = choose(logits.expand(4000, -1), batch)
    left = kept(logits[0], one)
    share = (logits[0].double() / one.temperature).softmax(-1)
    counts = torch.bincount(tokens, minlength=VOCABULARY).double() / 4000
    assert set(tokens.tolist()) <= left
    expected = torch.tensor([share[i].item() if i in left else 0.0 for i in range(VOCABULARY)], dtype=torch.float64)
    torch.testing.assert_close(counts, expected / expected.sum(), rtol=0, atol=0.035)  # four deviations of a half


def test_neighbours_do_not_change_what_a_row_draws():
    batch = [
        Sampling(temperature=1.0, seed=1, top_k=3),
        Sampling(temperature=0.8, seed=2, top_p=0.9),
        Sampling(),
        Sampling(temperature=1.3, seed=4, repetition_penalty=1.5),
        Sampling(temperature=1.0, seed=5, logprobs=True, min_p=0.1),
        Sampling(temperature=1.0, seed=6),
    ]
    for seed in range(20):
        logits = random_logits(len(batch), seed)
        together, _ = choose(logits, batch)
        alone = [int(choose(logits[i : i + 1], [one])[0]) for i, one in enumerate(batch)]
        assert together.tolist() == alone


def test_log_probabilities_are_those_of_the_tempered_softmax_over_everything():
    logits = random_logits(3)
    batch = [
        Sampling(temperature=0.5, seed=1, logprobs=True),
        Sampling(logprobs=True),
        Sampling(temperature=2.0, top_k=3, seed=3, logprobs=True, repetition_penalty=2.0),
    ]
    tokens, logprobs = choose(logits, batch, forbidden=[7])
    for row, heat in enumerate((0.5, 1.0, 2.0)):
        expected = (logits[row] / heat).log_softmax(-1)[tokens[row]]
        torch.testing.assert_close(logprobs[row], expected, rtol=1e-5, atol=1e-5)


def test_what_is_forbidden_never_comes_even_if_nothing_else_is_likely():
    logits = random_logits(64)
    logits[:, 9] = 1e4
    for heat in (0.0, 1.0, 1e-6, 1e6):
        tokens, _ = choose(logits, [Sampling(temperature=heat, seed=i) for i in range(64)], forbidden=[9, 39])
        assert not {9, 39} & set(tokens.tolist())


def test_a_repetition_penalty_moves_seen_tokens_towards_unlikely_on_both_sides_of_zero():
    logits = torch.full((2, VOCABULARY), -3.0)
    logits[0, 1], logits[0, 5] = 4.0, 3.0
    logits[1, 2], logits[1, 6] = -1.0, -1.5
    batch = [Sampling(repetition_penalty=2.0)] * 2
    assert choose(logits, batch)[0].tolist() == [5, 6]
    assert choose(logits, [Sampling()] * 2)[0].tolist() == [1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_logits_that_are_not_finite_are_told_and_hurt_no_neighbour(bad, heat):
    logits = random_logits(3)
    logits[1] = bad
    batch = [Sampling(temperature=heat, seed=i, logprobs=True) for i in range(3)]
    tokens, _ = choose(logits, batch)
    assert tokens[1] == -1
    assert tokens[[0, 2]].tolist() == choose(logits[[0, 2]], [batch[0], batch[2]])[0].tolist()
    assert choose(logits[1:2], [batch[1]])[0].tolist() == [-1]
    assert choose(logits[1:2], [Sampling(temperature=heat)])[0].tolist() == [-1]


@settings(max_examples=200)
@given(st.integers(0, 2**63 - 1), st.integers(1, 50))
def test_random_numbers_depend_on_the_seed_alone_and_are_below_one(seed, count):
    numbers = uniforms(seed, count)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    np.testing.assert_array_equal(numbers, uniforms(seed, count + 7)[:count])


def test_random_numbers_never_change_between_versions():
    assert (uniforms(7, 3) * 2**23).astype(int).tolist() == GOLDEN


GOLDEN = [7315482, 2477704, 3524034]


def test_samples_of_one_prompt_have_seeds_of_their_own():
    seeds = {sub_seed(seed, sample) for seed in (0, 1, 2**63 - 1) for sample in range(100)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sub_seed(5, 0) == 5


@pytest.mark.parametrize(
    "setting",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"max_tokens": 2.5},
        {"max_tokens": True},
        {"temperature": "hot"},
        {"temperature": 1e-40},
        {"top_k": 2.5},
        {"top_p": None},
        {"repetition_penalty": 1e-300},
        {"seed": 1.5},
        {"stop_ids": 5},
        {"stop_ids": ("end",)},
    ],
)
def test_a_setting_outside_its_range_is_refused_by_name(setting):
    with pytest.raises(SamplingError, match=next(iter(setting))):
        Sampling(**setting)


def test_numbers_of_numpy_are_numbers():
    assert Sampling(np.int64(5), np.float32(0.5), np.int32(3), seed=np.uint64(7)).top_k == 3
