"""The report's grids, win rates and categories: every number against the scores on disk, computed another way."""

import base64
import hashlib
import html
import io
import json
import re
from itertools import product

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_figures
from PIL import Image
from synthetic import EVAL_SETS, NUM_PROMPTS, config, frame, png, scores_path, table, write_scores, write_tree

from eval import scores as reading
from eval.sections import categories, curves, grids, wins
from eval.sections.grids import SIDE, picture, prompts_that_fit
from eval.sections.judges import judged, marked
from eval.sections.page import Context
from eval.stats import paired_difference, win_rate
from eval.wins import mean_intervals
from pso import paths
from pso.config import load
from pso.data import Prompt, prompts_of, write_parti_tsv
from pso.entries import UNTUNED, DatasetEntry
from pso.hub import hub_dir
from pso.provenance import UserError
from pso.runs import jobs

SHOWN = ["SDXL-DMD2", "Offline-PSO w/ SDXL-DMD2", "Online-PSO w/ SDXL-DMD2"]
METRICS = {"PickScore": "pick_score", "CLIP": "clip_score", "Sharpness": "sharpness"}
PLACES = {"pick_score": 2, "clip_score": 3, "sharpness": 3}
CARD = re.compile(r'<li>\s*<button class="zoom" type="button"><img class="(\w+)" src="(.+?)" alt="(.*?)".*?</li>', re.S)
SCORE = re.compile(r"<dt>(.+?)</dt><dd>(.+?)(?: <small>(.+?)</small>)?</dd>")


def cards(text: str) -> list[dict]:
    """What stands in the page: picture, alternative text, and scores as (title, value, change)."""
    found = []
    for match in CARD.finditer(text):
        kind, uri, alt = match.groups()
        data = base64.b64decode(uri.partition(",")[2])
        found.append(
            {"kind": kind, "uri": uri, "data": data, "alt": html.unescape(alt), "scores": SCORE.findall(match[0])}
        )
    return found


def tables_of(text: str) -> list[dict]:
    """Caption, heads and lines (head, cells) of every table; a cell is its text, then what is small in it."""
    found = []
    for body in re.findall(r"<table.*?</table>", text, re.S):
        lines = []
        for line in re.findall(r"<tr>(.*?)</tr>", body.partition("<tbody>")[2], re.S):
            cells = re.findall(r"<td[^>]*>(.*?)(?:<small>(.*?)</small>)?</td>", line)
            lines.append((html.unescape(re.search(r'<th scope="row">(.*?)</th>', line)[1]), cells))
        heads = [html.unescape(head) for head in re.findall(r'<th scope="col"[^>]*>(.*?)</th>', body)]
        found.append({"caption": re.search("<caption>(.*?)</caption>", body)[1], "heads": heads, "lines": lines})
    return found


def built(**changes):
    """test_figures' configuration, in which Online-PSO was trained on PickScore."""
    methods = dict(test_figures.built().methods)
    methods["pso_online"] = methods["pso_online"].model_copy(update={"reward": "pick_score"})
    return test_figures.built(**({"methods": methods} | changes))


def tree(results, **changes):
    cfg = test_figures.tree(results, built(**changes))
    write_tree(cfg, results)
    return cfg


def row_of(cfg, label):
    return next(row for row in cfg.table_entries["table1"].all_rows if row.label == label)


# ---- grids ----


def test_every_picture_stands_with_the_scores_of_exactly_this_image(tmp_path):
    cfg = tree(tmp_path, seeds=[0, 1])
    text = str(grids.section(Context(cfg, tmp_path)))
    found = cards(text)
    prompts = [f"p{place:03d}" for place in np.linspace(0, NUM_PROMPTS - 1, 6).round().astype(int)]
    first = list(product(prompts, SHOWN))
    assert len(found) == 6 * (3 + 3 + 4 + 4)
    for card, (prompt, label) in zip(found, first, strict=False):  # the first grid
        row = row_of(cfg, label)
        run = paths.run_dir(cfg.scale, "preference", row.model, row.method, 0, tmp_path)
        images = pd.read_parquet(paths.images_dir(run, "pickapic_test", 4))
        image = images[(images["prompt_id"] == prompt) & (images["image_seed"] == 0)].iloc[0]
        assert card["data"] == image["png"] and card["kind"] == "pixels"
        assert card["alt"] == f"{label}: {image['prompt']}"
        assert [title.removesuffix(" ‡") for title, _, _ in card["scores"]] == list(METRICS)
        for title, value, change in card["scores"]:
            metric = METRICS[title.removesuffix(" ‡")]
            assert ("‡" in title) == (row.method == "pso_online" and metric == "pick_score")
            scores = frame(row, "pickapic_test", metric).set_index(["prompt_id", "image_seed"])["score"]
            untuned = frame(row_of(cfg, SHOWN[0]), "pickapic_test", metric).set_index(["prompt_id", "image_seed"])[
                "score"
            ]
            scale, places = cfg.metrics[metric].scale, PLACES[metric]
            assert float(value) == pytest.approx(scale * scores[prompt, 0], abs=0.51 * 10**-places)
            if row.method == UNTUNED:
                assert change == ""
            else:
                assert float(change) == pytest.approx(scale * (scores - untuned)[prompt, 0], abs=0.51 * 10**-places)
                assert change[0] in "+-"
    assert "those of seed 0" in text


def test_a_row_that_was_trained_on_a_copy_of_a_metric_is_marked():
    cfg = load({"scale": "miniature"})
    row = next(row for row in cfg.table_entries["table1"].rows if row.method == "spo_transplant")
    assert marked(cfg, row, "pick_score", "SPO") == "SPO ‡" and marked(cfg, row, "hps_v21", "SPO") == "SPO"


def test_the_other_noise_or_training_seed_would_be_seen():
    """What the test above relies on: these scores differ by more than it allows."""
    row = row_of(config(), SHOWN[2])
    scores = frame(row, "pickapic_test", "pick_score").set_index(["prompt_id", "image_seed"])["score"]
    other = frame(row, "pickapic_test", "pick_score", 1).set_index(["prompt_id", "image_seed"])["score"]
    prompts = [f"p{place:03d}" for place in np.linspace(0, NUM_PROMPTS - 1, 6).round().astype(int)]
    assert max(abs(scores[p, 0] - scores[p, 1]) for p in prompts) > 1e-3
    assert max(abs(scores[p, 0] - other[p, 0]) for p in prompts) > 1e-3


def test_a_prompt_is_text_and_never_markup(tmp_path):
    cfg = tree(tmp_path)
    bad = 'a <b>&"red"</b><script>alert(1)</script> circle'
    for shard in tmp_path.rglob("shard*.parquet"):
        read = pq.read_table(shard)
        column = pa.array([bad] * read.num_rows)
        pq.write_table(read.set_column(read.column_names.index("prompt"), "prompt", column), shard)
    text = str(grids.section(Context(cfg, tmp_path)))
    assert "<b>" not in text and "<script>" not in text and "&lt;b&gt;" in text
    assert cards(text)[0]["alt"] == f"SDXL-DMD2: {bad}"
    assert text.count(html.escape(bad, quote=True).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")) >= 6


def test_the_first_grid_is_open_and_a_picture_is_a_button(tmp_path):
    cfg = tree(tmp_path)
    text = str(grids.section(Context(cfg, tmp_path)))
    assert re.findall(r"<details( open)?>", text) == [" open", "", "", ""]
    assert text.count('<button class="zoom" type="button">') == text.count("<img ") == len(cards(text))
    assert "table1, pickapic_test: The rows of table1 with 4 steps" in text
    assert str(grids.section(Context(cfg, tmp_path))) == text


def test_an_image_without_score_has_a_dash_and_is_counted(tmp_path):
    cfg = tree(tmp_path)
    row = row_of(cfg, SHOWN[2])
    scores = frame(row, "pickapic_test", "clip_score")
    left = scores[scores["image_id"] != "p000-0"]
    told = {"num_images": len(scores), "dropped": {"not_finite": 1}}
    write_scores(
        scores_path(cfg, tmp_path, row, "pickapic_test", "clip_score"), left, row, "pickapic_test", "clip_score", **told
    )
    text = str(grids.section(Context(cfg, tmp_path)))
    assert [score[1:] for score in cards(text)[2]["scores"] if score[0] == "CLIP"] == [("–", "")]
    assert "3 scores are missing (–)" in text, "the image is in three grids"


def test_results_without_images_or_scores_are_a_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no shard.*make them with `python -m eval.generate"):
        grids.section(Context(test_figures.built(), tmp_path))
    cfg = tree(tmp_path)
    scores_path(cfg, tmp_path, row_of(cfg, SHOWN[1]), "pickapic_test", "sharpness").unlink()
    for section in (grids.section, wins.section):
        with pytest.raises(UserError, match=r"sharpness.parquet is not there; make it with `python -m eval.score"):
            section(Context(cfg, tmp_path))


def test_subjects_have_real_pictures_and_their_own_scores(tmp_path):
    cfg = test_figures.concept(tmp_path)
    entry = cfg.table_entries["table1"]
    for level, subject in enumerate(entry.subjects):
        for row, metric in product(entry.rows, METRICS.values()):
            run = paths.run_dir(cfg.scale, f"concept/{subject}", row.model, row.method, 0, tmp_path)
            path = paths.scores_file(run, "dreambooth_prompts", row.steps, metric)
            scores = frame(row, "pickapic_test", metric)
            write_scores(path, scores.assign(score=scores["score"] + 100 * level), row, "dreambooth_prompts", metric)
    found = cards(str(grids.section(Context(cfg, tmp_path))))
    levels = [np.asarray(Image.open(io.BytesIO(card["data"])))[9, 0, 0] for card in found]
    assert levels[:2] == [100, 101] and levels[4] == 200 and len(found) == 7, "the kite has one picture"
    assert found[0]["alt"].startswith("Real picture: cup: ") and found[0]["scores"] == []
    for card, subject, prompt in ((found[3], 0, "p000"), (found[6], 1, "p006")):
        scores = frame(entry.rows[1], "pickapic_test", "clip_score").set_index(["prompt_id", "image_seed"])["score"]
        value = next(float(value) for title, value, _ in card["scores"] if title == "CLIP")
        assert value == pytest.approx(100 * subject + scores[prompt, 0], abs=0.00051)


def test_small_pictures_keep_their_bytes_and_large_ones_are_averaged_without_loss():
    rng = np.random.default_rng(0)
    small = png(rng.integers(0, 256, (32, 32, 3), np.uint8))
    kept = picture(small)
    assert (kept.uri, kept.width, kept.reduced) == (
        "data:image/png;base64," + base64.b64encode(small).decode(),
        160,
        False,
    )
    pixels = rng.integers(0, 256, (2 * SIDE, 4 * SIDE, 3), np.uint8)
    large = picture(png(pixels))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(large.uri.partition(",")[2]))).convert("RGB")).astype(
        float
    )
    averaged = pixels.reshape(SIDE // 2, 4, SIDE, 4, 3).mean((1, 3))
    assert large.uri.startswith("data:image/webp") and large.original == (4 * SIDE, 2 * SIDE) and large.reduced
    assert (shown == Image.fromarray(pixels).resize((SIDE, SIDE // 2), Image.Resampling.BOX)).all(), "not without loss"
    assert np.abs(shown - averaged).max() <= 1
    assert (large.width, large.height) == (160, 80)


def test_as_many_prompts_as_the_page_holds_and_at_least_one():
    data = png(np.zeros((8, 8, 3), np.uint8))
    one = {"lines": [{"cards": [{"picture": picture(data)}] * 2}] * 4}
    size = len(picture(data).uri)
    assert prompts_that_fit([one, one], 16 * size) == 4
    assert prompts_that_fit([one, one], 12 * size) == prompts_that_fit([one, one], 16 * size - 1) == 3
    assert prompts_that_fit([one], 1) == 1


def test_a_page_that_would_grow_too_large_says_what_it_leaves_out(tmp_path, monkeypatch):
    cfg = tree(tmp_path)
    monkeypatch.setattr(grids, "BUDGET", 1)
    text = str(grids.section(Context(cfg, tmp_path)))
    assert "1 of 6 prompts are shown of each grid" in text and len(cards(text)) == 3 + 3 + 4 + 4


# ---- win rates ----


def test_groups_are_rows_of_one_number_of_steps_with_the_first_of_more_before_them():
    entries = load({"tables": ["table1", "extended"]}).table_entries
    found = {name: [[row.label for row in rows] for rows in wins.groups(entries[name])] for name in entries}
    first, second = found["table1"]
    assert first == ["SDXL", "SDXL-DPO", "SDXL-SFT", "SDXL-RPO", "SDXL-SPO", "SDXL-MaPO"]
    assert second[:2] == ["SDXL", "SDXL-DMD2"] and len(second) == 17 and "SDXL-DPO + DMD2-LoRA" in second
    turbo = found["table2"][1]
    assert turbo == [
        "SDXL-Turbo-4step",
        *(f"{name}SDXL-Turbo-1step" for name in ("", "Offline-PSO w/ ", "Online-PSO w/ ")),
    ]
    assert [len(rows) for rows in found["extended"]] == [6, 11, 12]
    assert found["table3"] == [
        ["Dreambooth w/ SDXL", "SDXL-Turbo", "PSO w/ SDXL-Turbo", "Naive DreamBooth w/ SDXL-Turbo"]
    ]


def test_win_rates_are_shares_of_prompts(tmp_path):
    cfg = tree(tmp_path)
    found = tables_of(str(wins.section(Context(cfg, tmp_path))))
    assert len(found) == len(METRICS) * len(EVAL_SETS)
    labels = ["SDXL", *SHOWN, "Naive fine-tune w/ SDXL-DMD2"]
    signs = 0
    for one in found:
        metric = METRICS[one["caption"].split(",")[0]]
        eval_set = one["caption"].split(", ")[1]
        assert one["caption"].endswith("50 and 4 steps: share of 30 prompts on which the row is above the column")
        means = {
            label: frame(row_of(cfg, label), eval_set, metric).groupby("prompt_id")["score"].mean() for label in labels
        }
        heads = ["SDXL", "SDXL-DMD2", "Offline-PSO", "Online-PSO", "Naive fine-tune"]
        heads[3] += " ‡" if metric == "pick_score" else ""
        assert one["heads"][1:] == heads == [head for head, _ in one["lines"]]
        for (_, cells), left in zip(one["lines"], labels, strict=True):
            for (text, interval), right in zip(cells, labels, strict=True):
                if left == right:
                    assert (text, interval) == ("–", "")
                    continue
                share = float((means[left] > means[right]).mean() + (means[left] == means[right]).mean() / 2)
                assert int(text.split(" %")[0]) == round(100 * share)
                low, high = map(float, interval.split(" to "))
                alone = win_rate(means[left], means[right], means[left].index, 200, 0)
                if 0 < share < 1:
                    assert (low, high) == pytest.approx((100 * alone.low, 100 * alone.high), abs=0.51)
                    assert text.endswith("*") == (alone.low > 0.5 or alone.high < 0.5)
                else:
                    assert text.endswith("*")
                signs += text.endswith("*")
    assert 0 < signs < len(found) * 20, "some pairs are open"


def test_metrics_are_the_papers_another_judge_and_what_changes_in_a_picture():
    cfg = load({"scale": "miniature"})
    found = {name: judged(cfg, cfg.table_entries[name]) for name in ("table1", "table3", "style")}
    paper = ["pick_score", "clip_score", "image_reward", "aesthetic_score"]
    assert found["table1"] == [*paper, "hps_v21", "sharpness"]
    assert found["table3"] == ["clip_t", "dino", "clip_i"]
    assert found["style"] == ["clip_score", "pick_score", "style", "sharpness"]
    paper_scale = load({"scale": "paper"})
    assert "style" not in judged(paper_scale, paper_scale.table_entries["style"]), "of the stand-in world alone"


def test_the_untuned_row_is_of_the_same_model_and_steps():
    entry = load({}).table_entries["table2"]
    found = {row.label: entry.untuned_of(row) for row in entry.all_rows}
    assert found["Online-PSO w/ SDXL-Turbo-1step"].label == "SDXL-Turbo-1step"
    assert found["Online-PSO w/ SDXL-Turbo-4step"].label == "SDXL-Turbo-4step"
    assert found["SDXL-Turbo-1step"] is found["SDXL-Turbo-4step + DPO delta"] is None
    assert table(rows=[row for row in table().rows if row.steps > 4]).untuned_of(table().extra_rows[0]) is None


def test_sections_together_read_every_file_once(tmp_path, monkeypatch):
    cfg, read, read_file = tree(tmp_path), [], reading.read_file
    monkeypatch.setattr(reading, "read_file", lambda path, again: read.append(path) or read_file(path, again))
    context = Context(cfg, tmp_path)
    for module in (grids, curves, wins):
        assert module.section(context) is not None
    assert len(read) == len(set(read)) > 10
    wins.section(Context(cfg, tmp_path))
    assert len(read) > len(set(read)), "another page reads anew"


# ---- categories ----

KINDS = [*["Animals"] * 12, *["Arts"] * 12, *["Food & <i>Drink</i>"] * 4, "World Knowledge", None]


def with_categories(results, absent=0):
    """Scores of prompts that stand in a list with their categories; the first `absent` do not."""
    lists = {
        "pickapic_test": DatasetEntry(format="caption_parquet", repo="none/none", files="none", num_seeds=2),
        "parti_prompts": DatasetEntry(format="parti_tsv", repo="google-research/parti", files="P.tsv", num_seeds=2),
    }
    cfg = built(datasets=lists, table_entries={"table1": table()})
    texts = [f'prompt {number} with "quotes"' for number in range(NUM_PROMPTS)]
    ids = [prompt.id for prompt in prompts_of(texts)]
    listed = [Prompt("", t, k, "Basic") for t, k in zip(texts, KINDS, strict=True)]
    write_parti_tsv(hub_dir(cfg.scale, results) / "google-research/parti/P.tsv", listed[::-1][: NUM_PROMPTS - absent])
    rename = dict(zip([f"p{number:03d}" for number in range(NUM_PROMPTS)], ids, strict=True))
    for row, metric in product(table().shown_rows, METRICS.values()):
        scores = frame(row, "parti_prompts", metric)
        scores["prompt_id"] = scores["prompt_id"].map(rename)
        write_scores(scores_path(cfg, results, row, "parti_prompts", metric), scores, row, "parti_prompts", metric)
    return cfg, dict(zip(ids, KINDS, strict=True))


def test_differences_of_a_category_are_those_of_its_prompts(tmp_path):
    cfg, kinds = with_categories(tmp_path)
    text = str(categories.section(Context(cfg, tmp_path)))
    found = tables_of(text)
    assert [one["caption"].split(",")[0] for one in found] == list(METRICS)
    names = ["Animals", "Arts", "Food & <i>Drink</i>", "World Knowledge", None]
    tuned = ["Offline-PSO w/ SDXL-DMD2", "Online-PSO w/ SDXL-DMD2", "Naive fine-tune w/ SDXL-DMD2"]
    signs = 0
    for one in found:
        metric = METRICS[one["caption"].split(",")[0]]
        scale, least = cfg.metrics[metric].scale, cfg.metrics[metric].decimals + 1
        assert [head.removesuffix(" ‡") for head, _ in one["lines"]] == ["Offline-PSO", "Online-PSO", "Naive fine-tune"]
        for label, (_, cells) in zip(tuned, one["lines"], strict=True):
            sides = []
            for side in (label, SHOWN[0]):
                read = pd.read_parquet(scores_path(cfg, tmp_path, row_of(cfg, side), "parti_prompts", metric))
                sides.append(scale * read.groupby("prompt_id")["score"].mean())
            of = sides[0].index.map(kinds)
            masks = [np.full(NUM_PROMPTS, True), *(of == name if name else of.isna() for name in names)]
            masks.append(masks[0])  # the one challenge, `Basic`
            for (value, interval), mask in zip(cells, masks, strict=True):
                left, right = sides[0][mask], sides[1][mask]
                shown = float(value.removesuffix(" *"))
                assert shown == pytest.approx((left - right).mean(), abs=0.51 * 10**-least)
                if mask.sum() < 2:
                    assert (interval, value[-1] == "*") == ("–", False)
                    continue
                alone = paired_difference(left, right, left.index, 200, 0)
                low, high = map(float, interval.split(" to "))
                assert (low, high) == pytest.approx((alone.low, alone.high), abs=0.51 * 10**-least)
                clear = mask.sum() >= 5 and (alone.low > 0 or alone.high < 0)
                assert value.endswith("*") == clear
                signs += clear
    assert 0 < signs < 3 * 3 * 7
    assert "Food &amp; &lt;i&gt;Drink&lt;/i&gt; §<small>n = 4" in text and "Arts<small>n = 12" in text
    assert "World Knowledge §<small>n = 1" in text and "(none given) §<small>n = 1" in text
    assert 'colspan="5">Category</th>' in text and 'colspan="1">Challenge</th>' in text


def test_prompts_that_the_list_does_not_have_are_a_column_and_are_counted(tmp_path):
    cfg, _ = with_categories(tmp_path, absent=12)
    text = str(categories.section(Context(cfg, tmp_path)))
    assert "12 prompts have scores but are not in the prompt list" in text
    assert "(not in the list)<small>n = 12" in text and "Animals" not in text


def test_without_categories_there_is_no_section_and_without_the_list_a_sentence(tmp_path):
    cfg, _ = with_categories(tmp_path)
    entry = table(eval_sets=["pickapic_test"])
    assert categories.section(Context(cfg.model_copy(update={"table_entries": {"table1": entry}}), tmp_path)) is None
    (hub_dir(cfg.scale, tmp_path) / "google-research/parti/P.tsv").unlink()
    with pytest.raises(
        UserError, match="google-research/parti has no file P.tsv in the hub .*`snakemake hub` makes it"
    ):
        categories.section(Context(cfg, tmp_path))


def test_rows_of_other_prompts_are_refused(tmp_path):
    cfg, kinds = with_categories(tmp_path)
    for label, metric in product([SHOWN[0], SHOWN[1], SHOWN[2], "Naive fine-tune w/ SDXL-DMD2"], ["sharpness"]):
        path = scores_path(cfg, tmp_path, row_of(cfg, label), "parti_prompts", metric)
        scores = pd.read_parquet(path)
        fewer = scores[scores["prompt_id"] != next(iter(kinds))]
        write_scores(path, fewer, row_of(cfg, label), "parti_prompts", metric)
    with pytest.raises(
        UserError, match="sharpness of 'Offline-PSO .* is of 29 prompts, other scores of table1 are of 30"
    ):
        categories.section(Context(cfg, tmp_path))


def test_intervals_of_many_lines_are_those_of_each_line_alone():
    rng = np.random.default_rng(3)
    some = np.round(64 * rng.normal(0.1, 1, (4, 9))) / 64  # sums without rounding: equal means of resamples are equal
    values = np.concatenate([some, np.full((1, 9), 0.1), [[0.0] * 8 + [1.0]]])
    found = np.stack(mean_intervals(values, [np.arange(9)], 400, 5), axis=1)
    for line, one in zip(values, found, strict=True):
        alone = paired_difference(line, np.zeros(9), np.arange(9), 400, 5)
        assert tuple(one) == pytest.approx((alone.value, alone.low, alone.high))


# ---- on results of the whole workflow ----


def test_scores_below_pictures_are_of_the_bytes_that_were_scored(smoke):
    """Each score of the page is found again by the sha256 of the picture above it."""
    results, cfg = smoke / "results", load({"scale": "smoke"})
    text = str(grids.section(Context(cfg, results)))
    scored: dict[tuple[str, str], set[float]] = {}
    for path in {job.scores(cfg.scale, "", results).parent for job in jobs(cfg)}:
        for file in path.glob("*.parquet"):
            metric = json.loads(pq.read_schema(file).metadata[b"pso_bench"])["metric"]
            for one in pq.read_table(file, columns=["image_sha256", "score"]).to_pylist():
                scored.setdefault((one["image_sha256"], metric), set()).add(cfg.metrics[metric].scale * one["score"])
    titles = {entry.title: name for name, entry in cfg.metrics.items()}
    count = 0
    for card in cards(text):
        for title, value, _ in card["scores"]:
            metric = titles[title.removesuffix(" ‡")]
            places = len(value.partition(".")[2])
            known = scored[hashlib.sha256(card["data"]).hexdigest(), metric]
            assert any(abs(float(value) - one) <= 0.51 * 10**-places for one in known)
            count += 1
    assert count > 1000
    for section in (wins.section, categories.section):
        assert "<table" in section(Context(cfg, results))
