"""Scores over the cost of tuning: what is read, the intervals against the untuned row, places, what is told."""

import numpy as np
import pandas as pd
import pytest
from synthetic import EVAL_SETS, NAIVE, ROWS
from test_figures import SHOWN, built, run_file, run_of, tree

from eval.gains import beside, cost, gains, spent
from eval.scores import pair, read_scores
from eval.stats import mean_interval, paired_difference
from pso import figures, paths
from pso.config import load
from pso.entries import UNTUNED, MethodEntry
from pso.provenance import UserError


def shown_of(cfg):
    (shown,) = figures.costs(cfg)
    return shown


def test_the_rows_are_those_of_the_tuned_grid_and_two_judges():
    shown = shown_of(built())
    assert shown.name == "cost_sdxl_dmd2" and shown.eval_sets == EVAL_SETS
    assert [row.label for row in shown.rows] == ["SDXL-DMD2", NAIVE.label, *SHOWN[1:]]
    assert shown.metrics == ("pick_score", "clip_score"), "image_reward is missing in this table"


def test_figures_of_the_miniature_are_one_for_each_model_with_rows_to_compare():
    cfg = load({})
    names = {shown.name for shown in figures.costs(cfg)}
    of_preference = {f"cost_{model}" for model in ("sdxl", "sdxl_dmd2", "sdxl_turbo", "sdxl_lcm")}
    assert names == of_preference | {"concept_cost_sdxl_turbo", "style_cost_sdxl_turbo"}
    for shown in figures.costs(cfg):
        assert {row.steps for row in shown.rows} == {cfg.models[shown.rows[0].model].tuned_steps}
    of = {shown.name: shown.metrics for shown in figures.costs(cfg)}
    assert of["cost_sdxl_dmd2"] == ("pick_score", "image_reward")
    assert of["concept_cost_sdxl_turbo"] == ("clip_t", "dino")


def test_a_row_has_its_own_mean_and_the_interval_of_its_difference(tmp_path):
    cfg = tree(tmp_path)
    frame = gains(cfg, tmp_path, shown_of(cfg)).set_index(["label", "eval_set", "metric"])
    assert len(frame) == 4 * 2 * 2
    untuned, online = (read_scores(cfg, tmp_path, row, "parti_prompts", "pick_score") for row in (ROWS[2], ROWS[4]))
    own = mean_interval(online.frame["score"], online.frame["prompt_id"], 200, 0)
    both = pair(online, untuned)
    gap = paired_difference(both["left"], both["right"], both["prompt_id"], 200, 0)
    line = frame.loc[(ROWS[4].label, "parti_prompts", "pick_score")]
    assert line["value"] == pytest.approx(own.value)
    level = frame.loc[("SDXL-DMD2", "parti_prompts", "pick_score"), "value"]
    assert (line["low"] - level, line["high"] - level) == pytest.approx((gap.low, gap.high))
    assert line["low"] > level, "two points above, and prompts differ by more"
    assert line["high"] - line["low"] < 0.5 * (own.high - own.low)
    alone = frame.loc[("SDXL-DMD2", "parti_prompts", "pick_score")]
    assert alone["low"] < alone["value"] < alone["high"] and np.isnan(alone["unet_forwards"])


def test_costs_are_means_over_runs_and_gpu_hours_are_of_gpus_alone(tmp_path):
    cfg = tree(tmp_path, built(seeds=[0, 1]))
    run = paths.run_dir(cfg.scale, "preference", "sdxl_dmd2", "pso_online", 1, tmp_path)
    run_file(run, unet_forwards=300, reward_queries=40)
    assert spent(cfg, tmp_path, ROWS[4], ("preference",)) == {
        "unet_forwards": 200.0,
        "reward_queries": 20.0,
        "gpu_hours": 0.0,
    }
    for seed in (0, 1):
        path = paths.run_dir(cfg.scale, "preference", "sdxl_dmd2", "pso_online", seed, tmp_path) / "run.json"
        text = path.read_text().replace('"cpus": 2', '"cpus": 2, "gpus": ["H", "H", "H", "H"]')
        path.write_text(text.replace('"processes": 1', '"processes": 4'))
    assert spent(cfg, tmp_path, ROWS[4], ("preference",))["gpu_hours"] == 2 * 4
    (run_of(cfg, tmp_path, "pso_offline") / "run.json").unlink()
    with pytest.raises(UserError, match="pso_offline.*run.json is not there; run `snakemake"):
        spent(cfg, tmp_path, ROWS[3], ("preference",))
    (run_of(cfg, tmp_path, "pso_offline") / "run.json").write_text('{"cost": {"wall_s"')
    with pytest.raises(UserError, match=r"pso_offline.*run\.json is no JSON \(.*; delete it"):
        spent(cfg, tmp_path, ROWS[3], ("preference",))


def test_the_figure_shows_each_row_where_it_cost_and_scored(tmp_path):
    methods = built().methods | {
        "pso_online": MethodEntry.model_construct(
            title="", module="pso.pso_online", data="", reward="lite", objective={}, tune=None
        )
    }
    lite = built().metrics["pick_score"].model_copy(update={"title": "Lite", "copy_of": "pick_score"})
    cfg = tree(tmp_path, built(methods=methods, metrics=built().metrics | {"lite": lite}))
    run_file(run_of(cfg, tmp_path, "pso_online"), unet_forwards=800, reward_queries=1234)
    shown = shown_of(cfg)
    frame = gains(cfg, tmp_path, shown)
    drawn = cost(cfg, shown, frame)
    assert [panel.get_title(loc="left") for panel in drawn.figure.axes] == [
        f"{metric}, {eval_set}" for metric in ("PickScore", "CLIP") for eval_set in EVAL_SETS
    ]
    panel = drawn.figure.axes[0]
    first = frame[(frame["eval_set"] == EVAL_SETS[0]) & (frame["metric"] == "pick_score")]
    points = {c.get_label(): c.lines[0].get_xydata()[0] for c in panel.containers}
    assert list(points) == ["Naive fine-tune", "Offline-PSO", "Online-PSO (1,234 reward queries)"]
    values = first[first["method"] != UNTUNED]["value"].to_list()
    assert [y for _, y in points.values()] == pytest.approx(values)
    x = [x for x, _ in points.values()]
    assert x[2] == pytest.approx(800) and 90 < x[0] < 100 < x[1] < 111, "equal costs stand side by side"
    assert panel.get_xscale() == "log" and panel.get_lines()[-1].get_label() == "untuned"
    assert "Some rows were trained on PickScore or a copy of it." in drawn.caption
    assert drawn.caption.endswith("Scale miniature: a stand-in world.")


def test_points_beside_each_other_keep_their_middle_and_others_their_place():
    found = beside(pd.Series([100.0, 400.0, 100.0, 100.0]))
    assert found[1] == 400 and found[0] < found[2] < found[3]
    assert np.sqrt(found[0] * found[3]) == pytest.approx(100) == found[2]
