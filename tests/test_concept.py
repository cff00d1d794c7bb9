"""Concept customisation: subjects as tasks, their pictures as training data, Table 3 from the DAG."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run, smoke_settings, snakemake
from hubs import last_line
from PIL import Image
from test_config import SHIPPED, nested, refusal

from eval.generate import generate
from eval.score import score
from eval.scores import find_row, read_scores
from pso.config import load
from pso.dreambooth import load_dreambooth, load_subject, read_prompt_file
from pso.hub import Hub, hub_dir
from pso.mdp import Ancestral
from pso.miniature import subjects, world
from pso.models import load_policy
from pso.paths import root_of, subject_of
from pso.provenance import UserError, sha256_of
from pso.runs import jobs, jobs_asked_for, metrics
from pso.sources import Given, Targets
from pso.training_data import SubjectPictures

SUBJECTS = ["cored_circle", "striped_triangle", "split_cross"]
SET = "dreambooth_prompts"


def config(**overrides):
    return load(json.loads(smoke_settings(**overrides)))


# ---- the stand-in set ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    subjects.make(config(), Hub(root))
    return root / "google/dreambooth/dataset"


def test_the_stand_in_folder_is_read_as_the_real_one(folder):
    found = load_dreambooth(folder)
    assert [s.name for s in found.subjects] == SUBJECTS and found.absent == found.unlisted == []
    assert [s.class_name for s in found.subjects] == ["circle", "triangle", "cross"]
    assert all(len(s.images) == 5 and len(set(s.prompts())) == 25 for s in found.subjects)
    assert all(s.prompts()[0] == f"a [V] {s.class_name} on the left, black background" for s in found.subjects)
    assert found.subjects[0].instance_prompt == "A photo of [V] circle"
    assert [len(t) for t in read_prompt_file(folder / "prompts_and_classes.txt")[1].values()] == [25, 25]


def test_prompts_use_the_worlds_words_and_all_its_places():
    known = {word for caption in world.OF_CAPTION for word in caption.replace(",", " ").replace(":", " ").split()}
    asked = [t.format("", "").replace(",", " ").replace(":", " ").split() for t in subjects.templates()]
    assert {word for words in asked for word in words} <= known
    places = {(b, p) for words in asked for b in world.BACKGROUNDS for p in world.POSITIONS if {b, p} <= {*words}}
    assert len(places) == len(world.BACKGROUNDS) * len(world.POSITIONS)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_is_one_thing_of_two_colours_in_many_places(name):
    thing = subjects.SUBJECTS[name]
    images = np.stack(subjects.pictures(thing, 9, seed=3)).astype(float)
    assert len({image.tobytes() for image in images}) == 9
    for colour in (thing.first, thing.second):
        near = (np.abs(images - colour).max(-1) < 12).sum((1, 2))
        assert (near > 20).all(), "each colour is seen in each picture"
    corners = images[:, :2, :2].mean((1, 2))
    grounds = np.array(list(world.BACKGROUNDS.values()))
    shown = {int(((grounds - corner) ** 2).sum(-1).argmin()) for corner in corners}
    assert shown == {0, 1, 2}, "no background belongs to it"


# ---- one subject as training data ----


@pytest.fixture(scope="module")
def hub(smoke):
    return Hub(hub_dir("smoke", smoke / "results"))


def test_a_subject_and_what_was_read_of_it(hub):
    hub = Hub(hub.root)
    subject = load_subject(hub, config().datasets[SET], SET, "split_cross")
    read = {entry["file"]: entry["sha256"] for entry in hub.inputs()}
    assert sorted(read) == [
        "dataset/prompts_and_classes.txt",
        *(f"dataset/split_cross/{k:02d}.png" for k in range(5)),
    ]
    assert read["dataset/split_cross/03.png"] == sha256_of(subject.images[3])
    for name, said in (("teapot", "'teapot' is no subject of data set dreambooth_prompts"), (None, "names none")):
        with pytest.raises(UserError, match=said) as error:
            load_subject(hub, config().datasets[SET], SET, name)
    assert "cored_circle" not in str(error.value)
    with pytest.raises(UserError, match="expected one of cored_circle, striped_triangle, split_cross"):
        load_subject(hub, config().datasets[SET], SET, "cored_circl")


@pytest.fixture(scope="module")
def policy(hub):
    return load_policy(config().models["sdxl_turbo"], Hub(hub.root), name="sdxl_turbo")


@pytest.fixture(scope="module")
def pictures(hub, policy):
    return SubjectPictures(
        policy, load_subject(Hub(hub.root), config().datasets[SET], SET, "cored_circle"), policy.encode_prompts
    )


def test_pictures_are_encoded_as_a_cache_holds_them(hub, policy, pictures):
    files = sorted((hub.root / "google/dreambooth/dataset/cored_circle").iterdir())
    mean, std = policy.encode_images(torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in files])))
    index = [0, 4, 5, 13, len(pictures) - 1]
    found = pictures.latents("target", index)
    of = [i % 5 for i in index]
    assert torch.equal(found[0], mean[of]) and torch.equal(found[1], std[of])
    assert len({tuple(row) for row in mean.flatten(1).tolist()}) == 5
    assert pictures.prompts == ["A photo of [V] circle"] and set(pictures.prompt_index.tolist()) == {0}
    expected = policy.encode_prompts(["A photo of [V] circle"])
    assert torch.equal(pictures.condition("cpu").hidden, expected.hidden)
    assert pictures.counts == {"subject": "cored_circle", "pictures": 5}
    with pytest.raises(ValueError, match="'reference'"):
        pictures.latents("reference", [0])


def test_a_picture_that_comes_twice_in_an_update_comes_with_other_noise(policy, pictures):
    from baselines.dreambooth import Config

    given = Given(policy, Ancestral([999, 749, 499, 249]), Config(times="uniform"), 0, 40, pairs=pictures)
    given.prompts, given.condition = pictures.prompts, pictures.condition("cpu")
    batch = Targets(given).batch(0)
    noise = batch.target.answer.flatten(1)
    assert len(noise) == 40 and len({tuple(row) for row in noise.tolist()}) == 40
    drawn = pd.Series([i % 5 for i in Targets(given).samples(0)]).value_counts()
    assert len(drawn) == 5 and len(set(batch.target.n.flatten().tolist())) > 20


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("preference", "data set dreambooth_prompts needs a subject, and the task names none"),
        ("concept/teapot", "'teapot' is no subject of data set dreambooth_prompts"),
    ],
)
def test_a_task_without_its_subject_is_one_sentence(with_hub, task, said):
    chosen = ("--task", task, "--model", "sdxl_turbo", "--method", "pso", "--results", str(with_hub))
    assert said in last_line(run("python", "-m", "pso.tune", *chosen, "--set", smoke_settings()))


# ---- entries ----


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("tables.table3.eval_sets", [SET, "parti_prompts"],
         "tables.table3 eval_sets names parti_prompts, whose format is parti_tsv; expected dreambooth, because the "
         "table has subjects."),
        ("tables.table3.subjects", [],
         "tables.table3 eval_sets names dreambooth_prompts, whose format is dreambooth; expected one without "
         "subjects."),
        ("methods.dreambooth.data", "pickapic_v2",
         "tables.table3 row 'Dreambooth w/ SDXL' trains on pickapic_v2, whose format is preference_parquet; expected "
         "dreambooth, because the table has subjects."),
    ],
)  # fmt: skip
def test_a_table_has_subjects_or_none(field, value, said):
    change = nested(field, value)
    if field.endswith("subjects"):
        change |= {"scale": "smoke", "scales": {"smoke": {"tables": {"table3": {"subjects": value}}}}}
    assert refusal(change) == said


def test_the_papers_table_has_the_30_subjects_of_the_real_set():
    table = SHIPPED["tables"]["table3"]
    assert len(set(table["subjects"])) == 30 and {"dog8", "wolf_plushie"} <= set(table["subjects"])
    assert [row["label"] for row in table["rows"]] == ["Dreambooth w/ SDXL", "SDXL-Turbo", "PSO w/ SDXL-Turbo"]
    assert SHIPPED["methods"]["pso"]["data"] == SET


# ---- jobs and --task ----


def test_every_row_is_made_for_every_subject():
    cfg = config()
    found = [job for job in jobs(cfg) if root_of(job.task) == "concept"]
    assert {job.subject for job in found} == set(SUBJECTS) and subject_of("preference") is None
    assert {(j.model, j.method) for j in found} == {
        ("sdxl", "dreambooth"), ("sdxl_turbo", "untuned"), ("sdxl_turbo", "pso"), ("sdxl_turbo", "dreambooth")
    }  # fmt: skip
    assert len(found) == 12 and str(found[0].folder("smoke")).startswith(f"results/smoke/concept/{SUBJECTS[0]}/")


def test_a_task_asks_for_its_own_jobs_and_metrics():
    cfg = config()
    concept, preference = (jobs_asked_for(cfg, "sdxl_turbo", task) for task in ("concept", "preference"))
    assert {root_of(job.task) for job in concept} == {"concept"} and not {*concept} & {*preference}
    assert {*concept} | {*preference} <= {*jobs_asked_for(cfg, "sdxl_turbo", None)}
    assert metrics(cfg, "concept") == ["clip_t", "dino", "clip_i"]
    assert "dino" not in metrics(cfg, "preference") and "pick_score" in metrics(cfg, "preference")
    with pytest.raises(UserError, match="--task is 'concep', but sdxl_turbo has no row for it .* concept"):
        jobs_asked_for(cfg, "sdxl_turbo", "concep")


def untuned(table: str) -> dict:
    """A table's rows, those that need a LoRA put aside."""
    return {
        kind: [row if row.get("method") == "untuned" else row | {"missing": "not here"} for row in rows]
        for kind, rows in SHIPPED["tables"][table].items()
        if kind in ("rows", "extra_rows")
    }


def test_one_task_is_made_and_scored_and_no_other(with_hub):
    rows = {"table2": untuned("table2"), "table3": untuned("table3") | {"subjects": SUBJECTS[:1]}}
    cfg = load(json.loads(smoke_settings(tables=rows)) | {"tables": list(rows)})
    generate(cfg, "sdxl_turbo", with_hub, "concept")
    score(cfg, "sdxl_turbo", with_hub, "concept")
    made = with_hub / "smoke" / "concept"
    assert not (with_hub / "smoke" / "preference").exists()
    assert {path.name for path in made.iterdir()} == {"sdxl_turbo", SUBJECTS[0]}
    scores = made / SUBJECTS[0] / "sdxl_turbo" / "untuned" / "seed0" / "scores" / SET / "steps4"
    assert {path.stem for path in scores.iterdir()} == {"clip_t", "dino", "clip_i"}
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.parquet")}
    generate(cfg, "sdxl_turbo", with_hub, None)  # all tasks: the other is made too, this one is kept
    assert (with_hub / "smoke/preference/sdxl_turbo/images.json").exists()
    assert before == {path: path.stat().st_mtime_ns for path in before}


# ---- the DAG ----


@pytest.fixture(scope="module")
def table3(smoke, tmp_path_factory):
    """A results folder in which the whole DAG has made Table 3."""
    if (smoke / "results/smoke/tables/table3.csv").exists():
        return smoke
    folder = shutil.copytree(smoke, tmp_path_factory.mktemp("concept") / "run", symlinks=True)
    done = snakemake("table3", cwd=folder, settings={"tables": ["table3"]})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def files(root, model: str, method: str, steps: int, metric: str) -> list:
    run = f"{model}/{method}/seed0/scores/{SET}/steps{steps}/{metric}.parquet"
    return [root / "results/smoke/concept" / subject / run for subject in SUBJECTS]


def test_every_cell_is_the_mean_of_the_subjects_means(table3):
    table = pd.read_csv(table3 / "results/smoke/tables/table3.csv").set_index("label")
    for row in [*config().table_entries["table3"].rows, *config().table_entries["table3"].extra_rows]:
        for metric in ("clip_t", "dino", "clip_i"):
            means = [
                pq.read_table(path).to_pandas()["score"].mean()
                for path in files(table3, row.model, row.method, row.steps, metric)
            ]
            cell = table.loc[row.label]
            assert cell[metric] == pytest.approx(np.mean(means)), (row.label, metric)
            assert cell[f"{metric}_low"] <= cell[metric] <= cell[f"{metric}_high"]
    assert set(table["num_prompts"]) == {75} and set(table["num_images"]) == {75}
    text = (table3 / "results/smoke/tables/table3.md").read_text()
    assert "prompts within subjects, because there are fewer than 10" in text and "without the identifier" in text
    assert (table3 / "results/smoke/tables/table3.diff.md").stat().st_size > 0


def test_a_run_tells_its_subject_and_its_pictures(table3):
    base = table3 / "results/smoke/concept/striped_triangle/sdxl_turbo/pso/seed0"
    record = json.loads((base / "run.json").read_text())
    assert record["data"] == {"subject": "striped_triangle", "pictures": 5}
    assert record["config"]["task"] == "concept/striped_triangle" and "pick_score" not in record["config"]["metrics"]
    read = [entry["file"] for entry in record["inputs"] if entry.get("repo") == "google/dreambooth"]
    assert [name for name in read if name.endswith(".png")] == [
        f"dataset/striped_triangle/{k:02d}.png" for k in range(5)
    ]
    told = json.loads(pq.read_schema(files(table3, "sdxl_turbo", "pso", 4, "dino")[1]).metadata[b"pso_bench"])
    assert told["task"] == "concept/striped_triangle" and len(set(told["pictures"])) == 5


def test_prompts_of_two_subjects_are_two_prompts(table3):
    cfg = config()
    table = cfg.table_entries["table3"]
    found = read_scores(cfg, table3 / "results", find_row(table, "SDXL-Turbo"), SET, "dino", table.tasks)
    assert found.frame["prompt_id"].nunique() == 75 and set(found.frame["subject"]) == set(SUBJECTS)
    assert (found.frame["prompt_id"].str.partition("/")[0] == found.frame["subject"]).all()


def test_a_subject_without_scores_is_named(table3, tmp_path):
    cfg = config()
    table = cfg.table_entries["table3"]
    shutil.copytree(table3 / "results/smoke/concept", tmp_path / "smoke/concept")
    row = find_row(table, "SDXL-Turbo")
    (tmp_path / "smoke/concept/split_cross/sdxl_turbo/untuned/seed0/scores" / SET / "steps4/dino.parquet").unlink()
    with pytest.raises(UserError, match=r"concept/split_cross/sdxl_turbo/untuned/.*dino.parquet is not there"):
        read_scores(cfg, tmp_path, row, SET, "dino", table.tasks)
