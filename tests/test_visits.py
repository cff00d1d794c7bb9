"""Which pairs are visited: the order with rows left out, and what several runs need together."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_data import refused

from pso.config import load
from pso.visits import Plan, embeddings_plan, kept_pairs, kept_prompts, latents_plan, pair_indices, probed

COUNT = st.integers(2, 30)


@given(COUNT, st.data(), st.integers(1, 5), st.integers(0, 2**40))
def test_in_place_of_rows_left_out_come_the_next_in_the_order(count, drawn, batch, seed):
    left_out = tuple(sorted(drawn.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))))
    usable = count - len(left_out)
    found = [i for update in range(2 * usable) for i in pair_indices(update, batch, count, seed, left_out)]
    whole = [i for update in range(2 * count) for i in pair_indices(update, batch, count, seed)]
    assert found == [i for i in whole if i not in left_out][: len(found)]
    assert len(found) == 2 * usable * batch  # every batch is full


@given(COUNT, st.data(), st.integers(1, 4), st.integers(1, 6))
def test_what_is_kept_is_what_the_runs_visit_and_no_more(count, drawn, batch, updates):
    left_out = tuple(sorted(drawn.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))))
    visited = {i for seed in (0, 7) for u in range(updates) for i in pair_indices(u, batch, count, seed, left_out)}
    kept = kept_pairs(Plan({0: updates * batch, 7: updates * batch}), count, left_out)
    assert set(np.flatnonzero(kept)) == visited
    assert set(np.flatnonzero(kept_pairs(None, count, left_out))) == set(range(count)) - set(left_out)


def test_the_first_pairs_are_kept_where_asked_for():
    assert np.flatnonzero(kept_pairs(Plan(first=3), 8, (1,))).tolist() == [0, 2, 3]


def test_prompts_kept_are_those_of_the_pairs_and_those_probed():
    index, pairs = np.array([0, 0, 5, 9, 2]), np.array([False, True, True, False, False])
    kept = kept_prompts(Plan(probe_prompts=[3]), pairs, index, 10)
    assert np.flatnonzero(kept).tolist() == sorted({0, 5, *probed(3, 10)}) == [0, 3, 5, 6]
    assert kept_prompts(Plan(all_texts=True), pairs, index, 10).all()
    assert probed(16, 4) == [0, 1, 2, 3]


def test_nothing_usable_cannot_be_visited():
    with refused("out of 0 samples cannot be drawn"):
        pair_indices(0, 1, 3, 0, (0, 1, 2))


def test_the_plan_of_the_paper_is_the_longest_run_of_the_tables():
    config = load({"scale": "paper", "seeds": [0, 1]})
    plan = latents_plan(config, "sdxl_dmd2", "pickapic_v2")
    assert plan.visits == {0: 320000, 1: 320000} and not plan.all_texts
    assert plan.first == config.scale_entry.preference_model.num_pairs  # spo_adapted's judge learns from these
    assert latents_plan(config, "sdxl", "pickapic_v2").first == 0
    assert embeddings_plan(config, "clip_score", "pickapic_v2").visits == {0: 320000, 1: 320000}
    assert embeddings_plan(config, "pick_score", "pickapic_v2").visits == {}
    more = load({"scale": "paper", "tables": ["extended"]})
    assert latents_plan(more, "sdxl_dmd2", "pickapic_v2").visits == {0: 40000 * 64}
    assert latents_plan(load({"scale": "reduced"}), "sdxl_dmd2", "pickapic_v2").visits == {0: 128000}  # 0.4 of them
    assert latents_plan(load({"scale": "miniature"}), "sdxl_dmd2", "pickapic_v2") is None


def test_a_method_that_ranks_samples_of_the_pairs_prompts_needs_all_of_them():
    own = {"pso_online": {"data": "pickapic_v2"}}
    plan = latents_plan(load({"scale": "paper", "tables": ["table2"], "methods": own}), "sdxl_turbo", "pickapic_v2")
    assert plan.all_texts and plan.visits == {0: 320000}
