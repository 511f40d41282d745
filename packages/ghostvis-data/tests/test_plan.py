from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostvis_data import DataError
from ghostvis_data.packing import fill, pack
from ghostvis_data.plan import Plan

T = 64
lengths_lists = st.lists(st.integers(2, T), min_size=1, max_size=120)


@given(lengths_lists, st.integers(1, 40))
def test_packing_places_every_document_once_and_overfills_no_row(lengths, pool):
    rows = pack(lengths, T, pool)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= T for row in rows)


@given(lengths_lists)
def test_packing_within_the_pool_is_best_fit(lengths):
    """A plain search over all waiting documents gives the same rows."""
    waiting, rows = list(range(len(lengths))), []
    while waiting:
        row = [waiting.pop(0)]
        free = T - lengths[row[0]]
        while fits := [index for index in waiting if lengths[index] <= free]:
            best = max(fits, key=lambda index: (lengths[index], -index))
            waiting.remove(best)
            row.append(best)
            free -= lengths[best]
        rows.append(row)
    assert pack(lengths, T, pool=len(lengths)) == rows


def test_rows_are_well_filled():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 5000), 10, 2048).astype(int)
    assert fill(lengths, pack(lengths, 2048), 2048) > 0.985


@settings(max_examples=40)
@given(lengths_lists, lengths_lists, st.integers(0, 3), st.integers(1, 5))
def test_an_epoch_holds_every_sample_once(first, second, epoch, rows_per_step):
    plan = Plan([np.array(first), np.array(second)], [False, False], T, rows_per_step, seed=7)
    documents = [d for number in range(plan.epoch(epoch).rows) for d in plan.epoch(epoch).row(number)]
    assert Counter((d.dataset, d.sample) for d in documents) == Counter(
        [(0, i) for i in range(len(first))] + [(1, i) for i in range(len(second))]
    )
    assert all(d.tokens == (first, second)[d.dataset][d.sample] and d.start == 0 for d in documents)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 5 * T), min_size=1, max_size=30))
def test_a_long_text_is_cut_into_pieces_that_lose_nothing(lengths):
    plan = Plan([np.array(lengths)], [True], T, 2)
    covered: dict[int, list[tuple[int, int]]] = {}
    for number in range(plan.epoch(0).rows):
        row = plan.epoch(0).row(number)
        assert sum(d.tokens for d in row) <= T
        for d in row:  # a piece opens with <|bos|>, which is not of the text
            covered.setdefault(d.sample, []).append((d.start, d.start + d.tokens - 1))
    for sample, length in enumerate(lengths):
        spans = sorted(covered[sample])
        assert spans[0][0] == 0
        assert spans[-1][1] == length - 1
        assert all(a[1] == b[0] for a, b in pairwise(spans))


def test_steps_run_on_into_the_next_epoch_and_are_known_beforehand():
    plan = Plan([np.full(10, T)], [False], T, 4)  # 10 rows an epoch, 4 a step
    assert (plan.steps(1), plan.steps(2), plan.steps(0.5), plan.steps_per_epoch) == (3, 5, 2, 3)
    rows = [row for step in range(5) for row in plan.step_rows(step)]
    assert len(rows) == 20
    for epoch in (0, 1):
        assert sorted(d.sample for row in rows[10 * epoch : 10 * epoch + 10] for d in row) == list(range(10))


def test_epochs_differ_and_the_seed_decides():
    def order(seed, epoch):
        plan = Plan([np.full(50, T)], [False], T, 1, seed)
        return [plan.epoch(epoch).row(number)[0].sample for number in range(50)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_any_row_can_be_asked_for_first():
    lengths = [np.random.default_rng(0).integers(2, T, 100)]
    unbroken = Plan(lengths, [False], T, 3)
    rows = [unbroken.row(number) for number in range(300)]
    for number in (299, 0, 150):
        assert Plan(lengths, [False], T, 3).row(number) == rows[number]


def test_shares_hold_in_every_stretch_and_nothing_repeats_before_all_came():
    lengths = [np.full(1000, 8), np.full(10_000, 16)]
    plan = Plan(lengths, [False, False], T, 1, shares=[3, 1])
    rows = [row for epoch in range(2) for row in map(plan.epoch(epoch).row, range(plan.epoch(epoch).rows))]
    for stop in (1000, 2000, len(rows)):
        tokens = Counter()
        for row in rows[:stop]:
            for d in row:
                tokens[d.dataset] += d.tokens
        assert tokens[0] / tokens.total() == pytest.approx(0.75, abs=0.5 / stop**0.5)
    seen = [d.sample for row in rows for d in row if d.dataset == 1]
    assert max(Counter(seen).values()) == 1


def test_empty_data_and_wrong_shares_are_refused():
    with pytest.raises(DataError, match="empty"):
        Plan([np.zeros(0, int)], [False], T, 1)
    with pytest.raises(DataError, match="shares"):
        Plan([np.ones(3, int)], [False], T, 1, shares=[1, 2])
