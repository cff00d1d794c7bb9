"""Scoring as an API, as a command on anyone's pictures, and as the DAG's job: values, order, resume, sentences."""

import doctest
import io
import json
import shutil
import sys
import weakref

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toy
from PIL import Image
from test_compared import laplacian
from test_pictures import encoded, noise
from toy import quiet  # noqa: F401

from eval import score as score_module
from eval import scoring
from eval.metrics import clip_score, pick_score, sharpness
from eval.score import score, score_pictures
from eval.scores import find_row, read_scores
from pso.config import load
from pso.entries import Row, TableEntry
from pso.provenance import UserError, sha256_of
from pso.runs import jobs

CAPTIONS = ["a red circle on the left", "green cross", "a red circle on the left", "", "striped triangle " * 30, "x"]
CLIPS = ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Repositories by id, as --hub wants them: one tiny CLIP for two of them."""
    root = tmp_path_factory.mktemp("hub")
    clip = toy.clip_files(root / "toy")["model"]
    for repo in CLIPS:
        (root / repo).parent.mkdir(exist_ok=True)
        (root / repo).symlink_to(clip)
    return root


@pytest.fixture(scope="module")
def images():
    kinds = [("RGB", 64, 64), ("RGB", 80, 40), ("L", 33, 50), ("P", 70, 61), ("RGBA", 40, 90), ("I;16", 64, 48)]
    return [noise(width, height, mode, seed) for seed, (mode, width, height) in enumerate(kinds)]


@pytest.fixture(scope="module")
def scorers(hub):
    clip = {"model": hub / CLIPS[0], "processor": hub / CLIPS[0]}
    found = {"pick_score": pick_score.load(clip, "cpu"), "clip_score": clip_score.load(clip, "cpu")}
    return found | {"sharpness": sharpness.load({}, "cpu")}


# ---- the API ----


def test_the_example_in_the_docstring():
    found = doctest.testmod(scoring)
    assert found.attempted >= 6 and not found.failed


def test_scores_are_those_of_one_picture_at_a_time(scorers, images):
    found = score_pictures(images, CAPTIONS, scorers)
    assert list(found.columns) == list(scorers) and set(found.dtypes) == {np.dtype("float64")}
    for name, scorer in scorers.items():
        alone = [scorer.score([image], [text]).item() for image, text in zip(images, CAPTIONS, strict=True)]
        assert found[name].tolist() == pytest.approx(alone, rel=1e-5, abs=1e-5)
        assert found[name].std() > 1e-3


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_order_and_batch_change_nothing(scorers, images, batch):
    found = score_pictures(images, CAPTIONS, scorers)
    order = np.random.default_rng(batch).permutation(len(images))
    again = score_pictures([images[i] for i in order], [CAPTIONS[i] for i in order], scorers, batch=batch)
    assert np.allclose(again, found.iloc[order], rtol=1e-5, atol=1e-5)


def test_no_more_than_two_batches_are_decoded_at_once(scorers):
    alive, most = [], []

    class Lazy:
        def __len__(self):
            return 12

        def __getitem__(self, row):
            image = noise(seed=row)
            alive.append(weakref.ref(image))
            most.append(sum(one() is not None for one in alive))
            return image

    found = score_pictures(Lazy(), ["a"] * 12, scorers, batch=3)
    assert len(found) == 12 and len(most) == 12 and max(most) <= 6


def test_siblings_come_together_wherever_they_stand(images):
    class Siblings:
        compared_with = "siblings"

        def score(self, images, prompts, others):
            sizes = [sum(other.width for other in row) for row in others]
            return torch.tensor([float(size) for size in sizes])

    class Width:
        def score(self, images, prompts):
            return torch.tensor([float(image.width) for image in images])

    prompts = ["a", "b", "a", "b", "b", "a"]
    found = score_pictures(images, prompts, {"siblings": Siblings(), "width": Width()}, batch=2)
    for prompt in "ab":
        of = [i for i, p in enumerate(prompts) if p == prompt]
        assert (found["siblings"] + found["width"])[of].tolist() == [sum(images[i].width for i in of)] * 3
    assert found["width"].tolist() == [image.width for image in images]


def test_a_score_that_is_not_finite_is_named_and_a_wrong_shape_is_an_error(images):
    class Bad:
        def score(self, images, prompts):
            return torch.tensor([float("nan") if prompt == "x" else 1.0 for prompt in prompts])

    class Short:
        def score(self, images, prompts):
            return torch.zeros(1)

    class Refuses:
        def score(self, images, prompts):
            raise ValueError("no caption")

    with pytest.raises(UserError, match="bad of image n5 is not finite"):
        score_pictures(images, CAPTIONS, {"bad": Bad()}, names=[f"n{i}" for i in range(6)], batch=4)
    with pytest.raises(ValueError, match="expected one score for each"):
        score_pictures(images, CAPTIONS, {"short": Short()})
    with pytest.raises(UserError, match=r"refuses cannot score one of the images 0 to 5 \(no caption\); take it out"):
        score_pictures(images, CAPTIONS, {"refuses": Refuses()})
    with pytest.raises(UserError, match="6 pictures came with 5 prompts"):
        score_pictures(images, CAPTIONS[:5], {})


# ---- the command ----


@pytest.fixture
def folder(images, tmp_path):
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for k, image in enumerate(images):
        (root / (f"more/{k}.png" if k % 2 else f"{k}.PNG")).write_bytes(encoded(image))
    return root


NAMES = ["0.PNG", "2.PNG", "4.PNG", "more/1.png", "more/3.png", "more/5.png"]  # as they are sorted
OF_NAME = {name: CAPTIONS[int(name.removeprefix("more/")[0])] for name in NAMES}


def command(monkeypatch, *arguments) -> str | None:
    """`python -m eval.score`; the sentence it stops with, or none."""
    monkeypatch.setattr(sys, "argv", ["score", *map(str, arguments)])
    try:
        score_module.main()
    except SystemExit as stop:
        return stop.code
    return None


def as_file(path, kind: str):
    rows = [{"file_name": name, "prompt": text, "seed": k} for k, (name, text) in enumerate(OF_NAME.items())]
    rows = rows[::-1]
    texts = {
        "txt": "\n".join(OF_NAME.values()) + "\n",
        "json": json.dumps(rows),
        "jsonl": "\n".join(json.dumps({"file_name": r["file_name"], "text": r["prompt"]}) for r in rows),
        "csv": pd.DataFrame(rows).to_csv(index=False),
        "tsv": "\n".join(["file_name\tprompt", *(f"{r['file_name']}\t{r['prompt']}" for r in rows)]),
    }
    (path / f"prompts.{kind}").write_text(texts[kind])
    return path / f"prompts.{kind}"


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "csv", "tsv"])
def test_a_folder_and_its_prompts(kind, folder, hub, images, scorers, tmp_path, monkeypatch, capsys):
    out, prompts = tmp_path / "out" / "scores.parquet", as_file(tmp_path, kind)
    asked = "pick_score,clip_score,sharpness"
    stopped = command(
        monkeypatch, "--images", folder, "--prompts", prompts, "--metrics", asked, "--out", out, "--hub", hub
    )
    assert stopped is None
    table = pq.read_table(out)
    found = table.to_pandas()
    assert found["image_id"].tolist() == NAMES and found["prompt"].tolist() == list(OF_NAME.values())
    assert found.columns.tolist() == ["image_id", "prompt_id", "prompt", "image_seed", *asked.split(",")]
    seeds = list(range(6)) if kind in ("json", "csv") else [None] * 6
    assert table["image_seed"].to_pylist() == seeds
    same = [i for i, text in enumerate(found["prompt"]) if text == CAPTIONS[0]]
    assert len(same) == 2 and found["prompt_id"].nunique() == 5 and found["prompt_id"][same].nunique() == 1
    expected = score_pictures(images, CAPTIONS, scorers)
    order = [int(name.removeprefix("more/")[0]) for name in NAMES]
    assert np.allclose(found[asked.split(",")], expected.iloc[order], rtol=1e-5, atol=1e-5)
    told = json.loads(table.schema.metadata[b"pso_bench"])
    assert told["specs"]["pick_score"]["files"] and told["specs"]["clip_score"]["transform"] == "hps_letterbox224_noaa"
    assert told["seen"]["not_rgb"] == {"I;16": 1, "L": 1, "P": 1, "RGBA": 1} and told["seen"]["pictures"] == 6
    assert told["seen"]["eval_sets"] == {
        "pictures": {"prompts": 5, "empty": 1, "truncated": {"pick_score": 1, "clip_score": 1}}
    }
    assert {"torch", "transformers"} <= set(told["versions"])
    assert str(tmp_path) not in json.dumps(told), "no path of the machine"
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "pick_score" in line).split("|")
    assert float(row[2]) == pytest.approx(found["pick_score"].mean(), abs=1e-6) and row[4].strip() == "6"


@pytest.mark.parametrize("column", ["png", "image", "struct"])
def test_a_parquet_file_with_its_prompts(column, images, hub, scorers, tmp_path, monkeypatch):
    data = [encoded(image) for image in images]
    if column == "struct":
        data = [{"bytes": one, "path": None} for one in data]
    names = {"png": "png"}.get(column, "image")
    rows = {names: data, "prompt": CAPTIONS, "image_id": [f"id{k}" for k in range(6)]}
    pq.write_table(pa.table(rows), tmp_path / "mine.parquet", row_group_size=4)
    out = tmp_path / "scores.parquet"
    assert command(monkeypatch, "--images", tmp_path / "mine.parquet", "--out", out, "--hub", hub) is None
    found = pq.read_table(out).to_pandas()
    expected = score_pictures(images, CAPTIONS, scorers)
    assert found["image_id"].tolist() == rows["image_id"]
    assert np.allclose(found[["pick_score", "clip_score"]], expected[["pick_score", "clip_score"]], atol=1e-5)


def test_an_imagefolder_needs_no_prompts_and_untuned_pictures_go_by_name(folder, tmp_path, monkeypatch):
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in OF_NAME.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    untuned = tmp_path / "untuned"
    (untuned / "more").mkdir(parents=True)
    for k, name in enumerate(NAMES):
        with Image.open(folder / name) as image:
            noise(*image.size, seed=100 + k).save(untuned / name)
    out = tmp_path / "scores.parquet"
    given = ("--images", folder, "--metrics", "sharpness,sharpness_ratio", "--out", out)
    assert command(monkeypatch, *given, "--untuned", untuned) is None
    found = pq.read_table(out).to_pandas()
    expected = [laplacian(Image.open(untuned / name)) for name in NAMES]
    assert (found["sharpness"] / found["sharpness_ratio"]).tolist() == pytest.approx(expected, rel=1e-4)
    noise(30, 30).save(untuned / NAMES[2])
    assert "cannot be compared with one of (30, 30) px" in command(monkeypatch, *given, "--untuned", untuned)
    (untuned / NAMES[2]).unlink()
    assert "has 5 pictures, 5 of them under the names of the 6 to be scored" in command(
        monkeypatch, *given, "--untuned", untuned
    )
    assert "sharpness_ratio compares with the untuned model's pictures" in command(monkeypatch, *given)


def spoilt(name: str):
    def change(folder, prompts):
        if name == "picture without prompt":
            (folder / "z.png").write_bytes(encoded(noise()))
        elif name == "prompt without picture":
            (folder / "0.PNG").unlink()
        elif name == "broken picture":
            (folder / "2.PNG").write_bytes(encoded(noise())[:60])
        elif name == "named twice":
            prompts.write_text(prompts.read_text() + '\n{"file_name": "0.PNG", "text": "again"}')
        elif name == "no text":
            prompts.write_text(prompts.read_text() + '\n{"file_name": "0.PNG"}')
        elif name == "no JSON":
            prompts.write_text(prompts.read_text() + "\n{")
        elif name == "not UTF-8":
            prompts.write_bytes(b"\xff" + prompts.read_bytes())

    return change


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("picture without prompt", "1 of 7 pictures have no prompt in .*prompts.jsonl, the first is z.png"),
        ("prompt without picture", "names 1 pictures that are not there, the first is 0.PNG"),
        ("broken picture", "image 2.PNG cannot be decoded"),
        ("named twice", "names 1 pictures more than once, the first is 0.PNG"),
        ("no text", "item 7 has no text in file_name and prompt"),
        ("no JSON", "prompts.jsonl line 7 is not JSON"),
        ("not UTF-8", "is not UTF-8 at byte 0"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_no_file(name, said, folder, tmp_path, monkeypatch):
    import re

    prompts, out = as_file(tmp_path, "jsonl"), tmp_path / "scores.parquet"
    spoilt(name)(folder, prompts)
    stopped = command(monkeypatch, "--images", folder, "--prompts", prompts, "--metrics", "sharpness", "--out", out)
    assert re.search(said, stopped) and stopped.count("\n") == 0 and stopped.startswith("score: ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "neither --model nor --images is given"),
        (("--model", "sdxl", "--images", "x"), "--model and --images are both given"),
        (("--model", "sdxl", "--metrics", "dino", "--hub", "x"), "--metrics, --hub given with --model, which takes no"),
        (("--images", "{folder}", "--task", "style"), "--task given with --images, which takes no such option"),
        (("--images", "{folder}", "--out", "{folder}"), "would be written over or into --images"),
        (("--images", "{folder}", "--out", "{folder}/2.PNG"), "would be written over or into --images"),
        (("--images", "{folder}", "--prompts", "{txt}", "--out", "{txt}"), "would be written over or into --prompts"),
        (("--images", "{folder}", "--out", "."), "is a folder; expected a file such as scores.parquet"),
        (("--images", "{folder}", "--out", "/proc/none/x.parquet"), "x.parquet cannot be written ("),
        (("--images", "nowhere"), "nowhere is not there; expected a folder of pictures or a parquet file"),
        (("--images", ".", "--out", "../o.parquet"), "holds no file that ends in .jpg"),
        (("--images", "{folder}", "--metrics", "pick_scor"), "did you mean pick_score?"),
        (("--images", "{folder}", "--metrics", "sharpness"), "the pictures come without prompts; give --prompts"),
        (("--images", "{folder}", "--prompts", "x.doc"), "x.doc is not there"),
        (("--images", "{folder}", "--prompts", "{txt}", "--hub", "."), "repository yuvalkirstain/PickScore_v1 is not"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, said, folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    places = {"folder": folder, "txt": as_file(tmp_path, "txt")}
    stopped = command(monkeypatch, *(argument.format(**places) for argument in arguments))
    assert said in stopped and "\n" not in stopped


def test_as_many_lines_as_pictures(folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    given = ("--images", folder, "--prompts", tmp_path / "prompts.txt", "--metrics", "sharpness")
    assert "has 2 lines for 6 pictures" in command(monkeypatch, *given)


# ---- the DAG's job ----

MODEL, SETS = "sdxl_lcm", ("pickapic_test", "parti_prompts")
ROWS = [
    Row(label="untuned", model=MODEL, method="untuned", steps=4),
    Row(label="tuned", model=MODEL, method="pso_offline", steps=4),
]
COLUMNS = ["sharpness", "sharpness_ratio", "hf_ratio"]
PROMPTS = ["first", "second", ""]


def config():
    shipped = load({"scale": "smoke"})
    entry = TableEntry(caption="c", label="l", eval_sets=list(SETS), metrics=COLUMNS, rows=ROWS)
    sets = {name: shipped.datasets[name].model_copy(update={"num_seeds": 2, "num_rows": 3}) for name in SETS}
    changes = {"table_entries": {"small": entry}, "tables": ["small"], "datasets": shipped.datasets | sets}
    return shipped.model_copy(update=changes)


def picture(job, prompt: int, seed: int) -> Image.Image:
    return noise(24, 24, seed=1000 * (job.method == "untuned") + 100 * SETS.index(job.eval_set) + 10 * prompt + seed)


def write_run(results, shuffled: bool = False) -> None:
    """Images of every job as eval/generate.py leaves them, two shards each; the untuned ones in another order."""
    listed = []
    for job in jobs(config()):
        rows = [(prompt, seed) for prompt in range(3) for seed in range(2)]
        rows = rows[::-1] if job.method == "untuned" else rows
        folder, shards = job.images("smoke", results), []
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(2):
            lines = [
                {"image_id": f"p{p}-{s}", "prompt_id": f"p{p}", "prompt": PROMPTS[p], "image_seed": s,
                 "png": encoded(picture(job, p, s))}
                for p, s in rows[3 * k : 3 * k + 3]
            ]  # fmt: skip
            path = folder / f"shard{k}.parquet"
            pq.write_table(pa.Table.from_pylist(lines), path)
            name = str(path.relative_to(results / "smoke"))
            shards.append({"file": name, "images": 3, "sha256": sha256_of(path)})
        listed.append({**vars(job), "shards": shards})
    (results / "smoke/preference" / MODEL / "images.json").write_text(json.dumps({"images": listed}))


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path)
    score(config(), MODEL, tmp_path)
    return tmp_path


def files(results) -> dict:
    return {path: path.stat().st_mtime_ns for path in results.rglob("scores/**/*.parquet")}


def test_every_image_of_every_job_is_scored_against_the_untuned_one_of_its_noise(run):
    cfg = config()
    assert len(files(run)) == len(jobs(cfg)) * len(COLUMNS) == 12
    for job in jobs(cfg):
        row = find_row(cfg.table_entries["small"], "untuned" if job.method == "untuned" else "tuned")
        sharp, ratio = (read_scores(cfg, run, row, job.eval_set, m).frame for m in ("sharpness", "sharpness_ratio"))
        for line in sharp.itertuples():
            at = int(line.prompt_id[1:]), line.image_seed
            assert line.score == pytest.approx(laplacian(picture(job, *at)), rel=1e-4)
            expected = line.score / laplacian(picture(job.untuned, *at))
            assert ratio["score"][line.Index] == pytest.approx(expected, rel=1e-4)
    told = json.loads((run / "smoke/preference" / MODEL / "scores.json").read_text())
    one = {"prompts": 3, "empty": 1, "truncated": {}}
    assert told["seen"]["eval_sets"] == dict.fromkeys(SETS, one)
    assert told["seen"].items() >= {"pictures": 24, "not_rgb": {}, "multi_frame": 0}.items()
    assert told["cost"]["scores_made"] == 72 and set(told["specs"]) == set(COLUMNS)


def test_what_is_there_is_kept_and_what_is_lost_is_made_again_the_same(run):
    before = files(run)
    score(config(), MODEL, run)
    assert files(run) == before
    lost = sorted(before)[4]
    content = pq.read_table(lost)
    lost.unlink()
    score(config(), MODEL, run)
    assert pq.read_table(lost).equals(content)
    assert {path for path, time in files(run).items() if time != before[path]} == {lost}
    told = json.loads((run / "smoke/preference" / MODEL / "scores.json").read_text())
    assert told["cost"]["scores_made"] == 6


def test_other_untuned_images_change_only_what_is_compared_with_them(run):
    before = files(run)
    manifest = run / "smoke/preference" / MODEL / "images.json"
    content = json.loads(manifest.read_text())
    entry = next(e for e in content["images"] if e["method"] == "untuned" and e["eval_set"] == SETS[0])
    path = run / "smoke" / entry["shards"][1]["file"]
    rows = pq.read_table(path).to_pylist()
    rows[0]["png"] = encoded(noise(24, 24, seed=77))
    pq.write_table(pa.Table.from_pylist(rows), path)
    entry["shards"][1]["sha256"] = sha256_of(path)
    manifest.write_text(json.dumps(content))
    score(config(), MODEL, run)
    again = {"/".join(p.parts[-6:]) for p, time in files(run).items() if time != before[p]}
    tail = f"scores/{SETS[0]}/steps4"
    assert again == {f"untuned/seed0/{tail}/{m}.parquet" for m in COLUMNS} | {
        f"pso_offline/seed0/{tail}/sharpness_ratio.parquet"
    }


# ---- scores that are taken over ----


class Counting:
    """Sharpness that counts the pictures it was shown; `spec` may be another one."""

    compared_with, spec = None, {"version": 1}

    def __init__(self):
        self.plain, self.seen = sharpness.load({}, "cpu"), 0

    def score(self, images, prompts):
        self.seen += len(images)
        return self.plain.score(images, prompts)


@pytest.fixture
def counting(monkeypatch):
    """The scorer of the column `sharpness`."""
    scorer, load_metric = Counting(), score_module.load_metric
    monkeypatch.setattr(
        score_module, "load_metric", lambda name, *given: scorer if name == "sharpness" else load_metric(name, *given)
    )
    return scorer


def repaint(results, method: str, shard: int, change) -> None:
    """Change the rows of a shard on the first eval set, as if it was drawn again, and list it anew."""
    manifest = results / "smoke/preference" / MODEL / "images.json"
    content = json.loads(manifest.read_text())
    entry = next(e for e in content["images"] if e["method"] == method and e["eval_set"] == SETS[0])
    path = results / "smoke" / entry["shards"][shard]["file"]
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)
    entry["shards"][shard]["sha256"] = sha256_of(path)
    manifest.write_text(json.dumps(content))


def tuned_scores(results, metric: str) -> pd.DataFrame:
    job = next(job for job in jobs(config()) if job.method == "pso_offline" and job.eval_set == SETS[0])
    return pq.read_table(job.scores("smoke", metric, results)).to_pandas()


def new_picture(rows) -> None:
    rows[1]["png"] = encoded(noise(24, 24, seed=77))


def other_prompt(rows) -> None:
    rows[1]["prompt"] = "another prompt of the same id"


def other_order(rows) -> None:
    """The file is another one, the pictures are not."""
    rows.reverse()


CHANGED = [(new_picture, 1), (other_prompt, 1), (other_order, 0)]


@pytest.mark.parametrize(("change", "anew"), CHANGED, ids=[c.__name__ for c, _ in CHANGED])
def test_after_one_shard_has_changed_only_its_new_pictures_are_scored(tmp_path, counting, change, anew):
    write_run(tmp_path)
    score(config(), MODEL, tmp_path)
    assert counting.seen == 24
    before, counting.seen = tuned_scores(tmp_path, "sharpness"), 0
    repaint(tmp_path, "pso_offline", 1, change)
    score(config(), MODEL, tmp_path)
    found = tuned_scores(tmp_path, "sharpness")
    assert counting.seen == anew and len(found) == 6
    scores = (frame.set_index("image_id")["score"].sort_index() for frame in (before, found))
    assert sum(a != b for a, b in zip(*scores, strict=True)) == (change is new_picture)
    told = json.loads((tmp_path / "smoke/preference" / MODEL / "scores.json").read_text())["cost"]
    # hf_ratio as sharpness; sharpness_ratio compares, so all six are scored again
    assert (told["scores_made"], told["scores_taken_over"]) == (2 * anew + 6, 2 * (6 - anew))
    fresh = tmp_path / "fresh"
    shutil.copytree(tmp_path / "smoke", fresh / "smoke", ignore=shutil.ignore_patterns("scores"))
    score(config(), MODEL, fresh)
    for metric in COLUMNS:
        assert tuned_scores(fresh, metric).equals(tuned_scores(tmp_path, metric))


def test_another_scorer_scores_all_of_it_again(tmp_path, counting):
    write_run(tmp_path)
    score(config(), MODEL, tmp_path)
    counting.seen, counting.spec = 0, {"version": 2}
    repaint(tmp_path, "pso_offline", 1, new_picture)
    score(config(), MODEL, tmp_path)
    assert counting.seen == 24


@pytest.mark.parametrize("damage", ["cut", "of an earlier version"])
def test_a_file_that_cannot_be_taken_from_is_scored_again(tmp_path, counting, damage):
    write_run(tmp_path)
    score(config(), MODEL, tmp_path)
    job = next(job for job in jobs(config()) if job.method == "pso_offline" and job.eval_set == SETS[0])
    path = job.scores("smoke", "sharpness", tmp_path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:300])
    else:
        pq.write_table(pq.read_table(path).drop_columns(["image_sha256", "prompt"]), path)
    counting.seen = 0
    repaint(tmp_path, "pso_offline", 1, new_picture)
    score(config(), MODEL, tmp_path)
    assert counting.seen == 6


def test_known_scores_stand_and_the_others_are_those_without_them(scorers, images):
    whole = score_pictures(images, CAPTIONS, scorers, batch=4)
    known = {"pick_score": np.array([np.nan, 7.0, np.nan, 8.0, np.nan, np.nan])}
    found = score_pictures(images, CAPTIONS, scorers, batch=4, known=known)
    assert found["pick_score"][[1, 3]].tolist() == [7.0, 8.0] and np.isnan(known["pick_score"][0])
    others = [0, 2, 4, 5]
    assert np.allclose(found["pick_score"][others], whole["pick_score"][others], rtol=1e-5, atol=1e-5)
    assert found[["clip_score", "sharpness"]].equals(whole[["clip_score", "sharpness"]])


def test_scores_are_those_of_the_plain_order(scorers, images):
    """One batch after the other, nothing read ahead."""
    found = score_pictures(images, CAPTIONS, scorers, batch=2)
    for name, scorer in scorers.items():
        parts = [scorer.score(images[i : i + 2], CAPTIONS[i : i + 2]).double() for i in (0, 2, 4)]
        assert found[name].tolist() == torch.cat(parts).tolist()


def test_a_broken_picture_comes_out_after_the_batches_before_it(scorers):
    class Breaks:
        def __len__(self):
            return 6

        def __getitem__(self, row):
            if row == 5:
                raise UserError("image 5 cannot be decoded")
            return noise(seed=row)

    done = []
    with pytest.raises(UserError, match="image 5"):
        score_pictures(Breaks(), ["a"] * 6, scorers, batch=2, progress=lambda count, _: done.append(count))
    assert done == [2, 4]


@pytest.mark.parametrize("broken", ["picture", "untuned picture", "untuned row"])
def test_a_broken_image_stops_the_table(tmp_path, broken):
    write_run(tmp_path)
    manifest = tmp_path / "smoke/preference" / MODEL / "images.json"
    content = json.loads(manifest.read_text())
    method = "pso_offline" if broken == "picture" else "untuned"
    entry = next(e for e in content["images"] if e["method"] == method and e["eval_set"] == SETS[1])
    path = tmp_path / "smoke" / entry["shards"][1]["file"]
    rows = pq.read_table(path).to_pylist()
    if broken == "untuned row":
        rows[2]["prompt_id"] = "other"
    else:
        rows[2]["png"] = rows[2]["png"][:80]
    pq.write_table(pa.Table.from_pylist(rows), path)
    entry["shards"][1]["sha256"] = sha256_of(path)
    manifest.write_text(json.dumps(content))
    said = "the untuned model has no image of prompt p0 with seed" if "row" in broken else "cannot be decoded"
    with pytest.raises(UserError, match=said):
        score(config(), MODEL, tmp_path)
    assert not (tmp_path / "smoke/preference" / MODEL / "scores.json").exists()
    damaged = tmp_path.rglob(f"{method}/seed0/scores/{SETS[1]}/**/*.parquet")
    assert broken == "untuned row" or not list(damaged), "no score of a job with a broken image"


def test_progress_says_rate_and_time_left(monkeypatch):
    said, now = [], iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(scoring.time, "monotonic", lambda: next(now))
    progress = scoring.Progress(said.append)
    for done in (64, 128, 192, 256):
        progress(done, 1024)
    assert said == ["128/1024 pictures  21.3/s  left 0:42", "256/1024 pictures  21.3/s  left 0:36"]


def test_pictures_that_stay_in_their_mode_are_scored_as_the_official_transform_does(scorers):
    """A grey and a palette picture through the command's decoder and through Pillow's own file."""
    for mode in ("P", "L", "RGBA", "I;16"):
        image = noise(70, 50, mode)
        again = Image.open(io.BytesIO(encoded(image)))
        found = score_pictures([image, again], ["a", "a"], {"pick_score": scorers["pick_score"]})["pick_score"]
        assert found[0] == pytest.approx(found[1], abs=1e-6)
