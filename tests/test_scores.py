"""Reading scores: what is refused, and with which sentence."""

import pytest
import synthetic
from synthetic import NAIVE, ROWS, config, frame, scores_path, write_scores

from eval.scores import ScoreFiles, check_same_scorer, pair, per_image, read_scores
from pso.provenance import UserError
from pso.runs import metric_missing

ONLINE, SET, METRIC = ROWS[-1], "pickapic_test", "pick_score"


def written(results, cfg, scores=None, run_seed=0, row=ONLINE, **changes):
    path = scores_path(cfg, results, row, SET, METRIC, run_seed)
    write_scores(path, frame(row, SET, METRIC, run_seed) if scores is None else scores, row, SET, METRIC, **changes)
    return path


def read(cfg, results, row=ONLINE):
    return read_scores(cfg, results, row, SET, METRIC)


def test_scores_come_in_printed_units_and_pool_training_seeds(tmp_path):
    cfg = config(seeds=[0, 1])
    parts = [frame(ONLINE, SET, METRIC, seed) for seed in (0, 1)]
    for seed in (0, 1):
        written(tmp_path, cfg, run_seed=seed)
    scores = read(cfg, tmp_path)
    assert scores.run_seeds == [0, 1]
    assert len(scores.frame) == len(parts[0]) + len(parts[1])
    by_hand = 100 * (parts[0]["score"] + parts[1]["score"]) / 2
    assert per_image(scores).to_list() == pytest.approx(by_hand.to_list())
    assert per_image(scores, 1).to_list() == pytest.approx((100 * parts[1]["score"]).to_list())


def test_untuned_rows_have_one_run(tmp_path):
    cfg = config(seeds=[1, 2])
    written(tmp_path, cfg, row=ROWS[0])
    assert read(cfg, tmp_path, ROWS[0]).run_seeds == [0]


def test_a_pair_of_one_training_seed_is_of_that_seed_in_each_row_that_has_it(tmp_path):
    cfg = config(seeds=[0, 1])
    for row, seeds in ((ONLINE, (0, 1)), (ROWS[3], (0, 1)), (ROWS[2], (0,))):
        for seed in seeds:
            written(tmp_path, cfg, run_seed=seed, row=row)
    online, offline, untuned = (read(cfg, tmp_path, row) for row in (ONLINE, ROWS[3], ROWS[2]))
    both, half = pair(online, offline, 1), pair(untuned, online, 1)
    assert both["left"].to_list() == pytest.approx((100 * frame(ONLINE, SET, METRIC, 1)["score"]).to_list())
    assert both["right"].to_list() == pytest.approx((100 * frame(ROWS[3], SET, METRIC, 1)["score"]).to_list())
    assert half["left"].to_list() == per_image(untuned).to_list() and half["right"].equals(both["left"].rename("right"))


def test_files_are_read_once_and_rows_of_one_label_are_not_mixed_up(tmp_path):
    cfg = config()
    other = ROWS[0].model_copy(update={"label": ONLINE.label})  # as two tables may call different rows
    for row in (ONLINE, ROWS[0]):
        written(tmp_path, cfg, row=row)
    files = ScoreFiles(cfg, tmp_path)
    first, second = files(ONLINE, SET, METRIC), files(other, SET, METRIC)
    assert first.frame.equals(read(cfg, tmp_path).frame) and second.frame.equals(read(cfg, tmp_path, ROWS[0]).frame)
    assert not first.frame["score"].equals(second.frame["score"])
    assert files(ONLINE, SET, METRIC) is first and len(files.read) == 2


def test_a_file_that_is_not_there_names_the_command(tmp_path):
    with pytest.raises(UserError) as caught:
        read(config(), tmp_path)
    assert "pick_score.parquet is not there" in str(caught.value)
    assert '`python -m eval.score --model sdxl_dmd2 --set \'{"scale": "miniature"}\'' in str(caught.value)


def test_a_torn_file(tmp_path):
    path = written(tmp_path, config())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="cannot be read .*delete it and make it again"):
        read(config(), tmp_path)


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (lambda f: f.assign(score=f["score"].where(f.index != 3)), {}, "1 of 60 scores that are not finite"),
        (lambda f: f.assign(score=f["score"].where(f.index != 3, float("inf"))), {}, "1 of 60 scores"),
        (lambda f: f.assign(image_id="same"), {}, "59 repeated image_id"),
        (lambda f: f.assign(image_seed=0), {}, "30 repeated prompt_id and image_seed"),
        (lambda f: f.iloc[:-2], {"num_images": 60}, "58 scores and 0 dropped images of 60"),
        (lambda f: f.iloc[:-1], {}, "59 images for 30 prompts with 2 seeds each"),
        (lambda f: f.drop(columns="image_seed"), {}, "lacks image_seed"),
        (lambda f: f, {"method": "pso_offline"}, "method 'pso_offline' instead of 'pso_online'"),
        (lambda f: f, {"steps": 1}, "steps 1 instead of 4"),
        (lambda f: f, {"seed": 3}, "seed 3 instead of 0"),
    ],
)
def test_spoilt_files(tmp_path, spoil, changes, message):
    path = written(tmp_path, config(), spoil(frame(ONLINE, SET, METRIC)), **changes)
    with pytest.raises(UserError, match=message) as caught:
        read(config(), tmp_path)
    assert str(path) in str(caught.value) and "again" in str(caught.value)


def test_dropped_images_are_counted(tmp_path):
    scores = frame(ONLINE, SET, METRIC).iloc[:-3]
    written(tmp_path, config(), scores, num_images=60, dropped={"unreadable": 3})
    assert read(config(), tmp_path).dropped == {"unreadable": 3}


def test_rows_with_other_images_do_not_pair(tmp_path):
    cfg = config()
    written(tmp_path, cfg)
    written(tmp_path, cfg, frame(NAIVE, SET, METRIC).iloc[4:], row=NAIVE)
    with pytest.raises(UserError, match="4 images only in the first, 0 only in the second, 56 in both"):
        pair(read(cfg, tmp_path), read(cfg, tmp_path, NAIVE))


def test_pairs_are_by_prompt_and_seed_not_by_place(tmp_path):
    cfg = config()
    written(tmp_path, cfg)
    written(tmp_path, cfg, frame(NAIVE, SET, METRIC).sample(frac=1, random_state=0), row=NAIVE)
    pairs = pair(read(cfg, tmp_path), read(cfg, tmp_path, NAIVE))
    assert (pairs["left"] - pairs["right"]).to_list() == pytest.approx([5.0] * 60, abs=2.0)


def test_other_scorers_are_refused(tmp_path):
    cfg = config()
    written(tmp_path, cfg)
    written(tmp_path, cfg, row=NAIVE, spec={"name": "pick_score", "sha256": "1" * 64})
    with pytest.raises(UserError, match="different scorers .*they differ in sha256"):
        check_same_scorer([read(cfg, tmp_path), read(cfg, tmp_path, NAIVE)])


def test_training_seeds_with_other_scorers_are_refused(tmp_path):
    cfg = config(seeds=[0, 1])
    written(tmp_path, cfg)
    written(tmp_path, cfg, run_seed=1, spec={"name": "other"})
    with pytest.raises(UserError, match="the runs of 'Online-PSO"):
        read(cfg, tmp_path)


def test_training_seeds_with_other_images_are_refused(tmp_path):
    cfg = config(seeds=[0, 1])
    written(tmp_path, cfg)
    written(tmp_path, cfg, frame(ONLINE, SET, METRIC, 1).iloc[2:], run_seed=1)
    with pytest.raises(UserError, match="2 of 60 images .* for some of its 2 training seeds"):
        read(cfg, tmp_path)


def test_why_a_column_is_missing():
    entry = synthetic.metric("Texture", only_scales=["smoke"])
    cfg = config(metrics={**config().metrics, "texture": entry})
    table = synthetic.table(extra_metrics=["texture"])
    assert metric_missing(cfg, table, "texture") == "exists only at scale smoke"
    assert metric_missing(cfg, table, "image_reward") == "not built yet"
    assert metric_missing(cfg, table, "pick_score") is None
