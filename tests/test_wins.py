"""Win rates of all rows of a table: against eval.stats.win_rate pair by pair, ends, strata, what is refused."""

import itertools

import matplotlib.colors
import numpy as np
import pytest
import test_figures as concept_tree
from synthetic import NAIVE, ROWS, config, frame, scores_path, table, write_scores, write_tree

from eval.scores import find_row, pair, read_scores, units
from eval.stats import strata_of, win_rate
from eval.win_maps import cell_colours, win_map
from eval.wins import COLUMNS, shares, win_rates
from pso import figures, paths
from pso.config import load
from pso.provenance import UserError

SET = "pickapic_test"
UNEQUAL = np.repeat(["a", "b", "c"], [4, 3, 9])


def test_every_pair_is_that_of_the_two_rows_alone(tmp_path):
    cfg = config(seeds=[0, 1])
    write_tree(cfg, tmp_path)
    found = win_rates(cfg, tmp_path, "table1", "pick_score", SET)
    entry = cfg.table_entries["table1"]
    labels = [row.label for row in entry.shown_rows]
    assert list(found.columns) == COLUMNS
    assert list(zip(found["left"], found["right"], strict=True)) == [(a, b) for a in labels for b in labels if a != b]
    assert (found["prompts"] == 30).all()
    for line in found.itertuples():
        sides = [read_scores(cfg, tmp_path, find_row(entry, la), SET, "pick_score") for la in (line.left, line.right)]
        both = pair(*sides)
        alone = win_rate(both["left"], both["right"], resamples=200, seed=0, **units(both))
        assert line.win_rate == pytest.approx(alone.value)
        if 0 < alone.value < 1:
            assert (line.low, line.high) == pytest.approx((alone.low, alone.high))
    turned = found.set_index(["right", "left"]).reindex(list(zip(found["left"], found["right"], strict=True)))
    assert found["low"].to_numpy() == pytest.approx(1 - turned["high"].to_numpy())


@pytest.mark.parametrize("shape", [None, UNEQUAL])
def test_intervals_are_scipys_with_and_without_strata(shape):
    rng = np.random.default_rng(1)
    above = rng.choice([0, 0.5, 1], (7, 16), p=[0.2, 0.1, 0.7])
    clusters = np.arange(16)
    strata = strata_of(clusters, shape) or [clusters]
    rate, low, high = shares(above, strata, 300, 3)
    for k in range(7):
        alone = win_rate(above[k], np.full(16, 0.5), clusters, 300, 3, strata=shape)
        assert (rate[k], low[k], high[k]) == pytest.approx((alone.value, alone.low, alone.high))


def test_a_row_above_on_every_prompt_has_the_exact_interval_of_a_share():
    for prompts, excludes in ((2, False), (5, False), (6, True), (24, True)):
        above = np.stack([np.ones(prompts), np.zeros(prompts), np.full(prompts, 0.5)])
        rate, low, high = shares(above, [np.arange(prompts)], 50, 0)
        assert rate.tolist() == [1, 0, 0.5]
        # Clopper and Pearson: so rare a run of successes is improbable below `low`
        assert low[0] ** prompts == pytest.approx(0.025) and high[0] == 1
        assert (1 - high[1]) ** prompts == pytest.approx(0.025) and low[1] == 0
        assert (low[0] > 0.5) == excludes
        assert (low[2], high[2]) == (0.5, 0.5)


def of_subjects(results):
    """Two rows of a cup, of which the second is above on 10 of 30 prompts, and of a kite, where it is on all."""
    cfg = concept_tree.concept(results)
    for row, metric in itertools.product((ROWS[2], ROWS[3]), ("pick_score", "clip_score")):
        for subject, count in (("cup", 10), ("kite", 30)):
            scores = frame(row, "dreambooth_prompts", metric)
            above = row.method == "pso_offline"
            scores["score"] = [float(above and int(prompt[1:]) < count) for prompt in scores["prompt_id"]]
            run = paths.run_dir(cfg.scale, f"concept/{subject}", row.model, row.method, 0, results)
            path = paths.scores_file(run, "dreambooth_prompts", row.steps, metric)
            write_scores(path, scores, row, "dreambooth_prompts", metric)
    return cfg


def test_subjects_count_once_each(tmp_path):
    cfg = of_subjects(tmp_path)
    found = win_rates(cfg, tmp_path, "table1", "pick_score", "dreambooth_prompts").set_index("left")
    ours = found.loc[ROWS[3].label]
    # of the cup above on 10 prompts and equal on 20, of the kite above on all
    assert ours["win_rate"] == pytest.approx(((10 + 10) / 30 + 1) / 2) and ours["prompts"] == 60
    assert ours["low"] < ours["win_rate"] < ours["high"] < 1


def test_other_images_and_columns_without_numbers_are_refused(tmp_path):
    cfg = config()
    write_tree(cfg, tmp_path)
    with pytest.raises(UserError, match="has no eval set 'coco'; expected pickapic_test or parti_prompts"):
        win_rates(cfg, tmp_path, "table1", "pick_score", "coco")
    with pytest.raises(UserError, match="no numbers of 'image_reward': not built yet"):
        win_rates(cfg, tmp_path, "table1", "image_reward", SET)
    scores = frame(NAIVE, SET, "pick_score").iloc[2:]
    write_scores(scores_path(cfg, tmp_path, NAIVE, SET, "pick_score"), scores, NAIVE, SET, "pick_score")
    with pytest.raises(UserError, match="does not pair up: 2 images only in the first"):
        win_rates(cfg, tmp_path, "table1", "pick_score", SET)


def test_one_row_has_no_pairs(tmp_path):
    cfg = config(table_entries={"table1": table(rows=[ROWS[2]], extra_rows=[])})
    write_tree(cfg, tmp_path)
    found = win_rates(cfg, tmp_path, "table1", "pick_score", SET)
    assert found.empty and list(found.columns) == COLUMNS


# ---- the map ----


def test_a_map_shows_every_rate_and_marks_what_is_clear(tmp_path):
    cfg = config()
    write_tree(cfg, tmp_path)
    (shown,) = figures.matrices(cfg)
    drawn = win_map(cfg, tmp_path, shown)
    assert shown.metrics == ("pick_score", "clip_score") and shown.name == "win_rates_table1"
    labels = [row.label for row in shown.rows]
    for metric, panel in zip(shown.metrics, drawn.figure.axes, strict=True):
        found = win_rates(cfg, tmp_path, "table1", metric, SET).set_index(["left", "right"])
        cells = {text.get_position(): text for text in panel.texts}
        assert len(cells) == len(labels) * (len(labels) - 1)
        for (x, y), text in cells.items():
            line = found.loc[(labels[int(y)], labels[int(x)])]
            assert text.get_text() == f"{100 * line['win_rate']:.0f}"
            assert (text.get_weight() == "bold") == (line["low"] > 0.5 or line["high"] < 0.5)
        assert {text.get_weight() for text in cells.values()} == {"bold", "normal"}
        # the row stands above the column: the axis begins at the top
        assert panel.get_ylim()[0] > panel.get_ylim()[1]
    assert "30 prompts" in drawn.title and "a bootstrap over prompts that" in drawn.caption
    assert drawn.caption.endswith("Scale miniature: a stand-in world.")


def test_a_map_of_many_subjects_counts_subjects(tmp_path, monkeypatch):
    for module in ("eval.scores", "eval.tables"):
        monkeypatch.setattr(f"{module}.MANY_SUBJECTS", 2)
    cfg = of_subjects(tmp_path)
    (shown,) = figures.matrices(cfg)
    drawn = win_map(cfg, tmp_path, shown)
    assert "on how many of 2 subjects a row" in drawn.title and "a bootstrap over subjects that" in drawn.caption


def test_numbers_are_read_on_their_cells():
    """Contrast of at least 4.5 (WCAG AA) at every rate."""

    def luminance(colour) -> float:
        rgb = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    for rate in range(101):
        back, front = (luminance(colour) for colour in cell_colours(rate))
        assert (max(back, front) + 0.05) / (min(back, front) + 0.05) >= 4.5, rate


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        (["table1"], {"win_rates_table1": 16}),
        (["table2"], {"win_rates_table2": 12}),
        (
            ["extended"],
            {f"win_rates_extended_{m}": n for m, n in (("sdxl_dmd2", 6), ("sdxl_lcm", 11), ("sdxl_turbo", 12))},
        ),
    ],
)
def test_a_table_with_many_rows_shows_those_of_few_steps_or_of_each_model(tables, expected):
    found = figures.matrices(load({"tables": tables}))
    assert {shown.name: len(shown.rows) for shown in found} == expected
