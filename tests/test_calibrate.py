"""Untuned rows on their own: held against the paper's cells by known shifts, named where they are off, made once."""

import contextlib
import json
import re
import sys
from collections import Counter
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pandas as pd
import pytest
import test_score
from conftest import run, snakemake
from PIL import Image
from synthetic import ROWS, config, metric, scores_path, table, write_scores

import eval.generate as generate_module
from eval import diff, tables
from eval.calibrate import main, told, write
from eval.cost import records, stage
from eval.generate import generate
from eval.paper import load_reference
from eval.run_notes import dropped_note
from eval.score import main as score_main
from eval.score import score
from eval.untuned import judge
from pso.config import load
from pso.data import prompts_of
from pso.entries import UNTUNED, ModelEntry, Row
from pso.paths import run_dir
from pso.provenance import UserError, sha256_of
from pso.runs import calibrations, jobs, off_before

SETS = ("pickapic_test", "parti_prompts")
TEACHER, STUDENT, TUNED = ROWS[0], ROWS[2], ROWS[3]
NUM, SPREAD = 200, {"pick_score": 0.015, "clip_score": 0.04, "aesthetic_score": 0.5}
SCALE = {"pick_score": 100.0}
HALF = {name: 1.96 * spread / NUM**0.5 for name, spread in SPREAD.items()}  # of an interval, by the normal law


def paper_config(scale="paper", **changes):
    """table1 as the paper has it, with two untuned rows and a tuned one; ImageReward is declared missing."""
    there = {row.label: row for row in (TEACHER, STUDENT, TUNED)}
    labels = load_reference("table1").drop_duplicates("label")
    rows = [there.get(la) or Row(label=la, steps=n, missing="not built yet")
            for la, n in zip(labels["label"], labels["steps"], strict=True)]  # fmt: skip
    metrics = ["pick_score", "clip_score", "image_reward", "aesthetic_score"]
    entry = table(rows=rows, extra_rows=[], extra_metrics=[], metrics=metrics,
                  missing_metrics={"image_reward": "no weights"})  # fmt: skip
    made = config(scale=scale)
    finer = made.scale_entry.model_copy(update={"bootstrap_resamples": 1000})
    more = {
        "scale_entry": finer,
        "table_entries": {"table1": entry},
        "metrics": made.metrics | {"aesthetic_score": metric("Aesthetic", decimals=3)},
        "datasets": {name: made.datasets[name].model_copy(update={"num_seeds": 1}) for name in SETS},
        "models": {name: ModelEntry.model_construct(title=name, tuned_steps=steps)
                   for name, steps in {"sdxl": 50, "sdxl_dmd2": 4}.items()},
    }  # fmt: skip
    return config(scale=scale, **(more | changes))


def printed(label: str, eval_set: str, name: str) -> float:
    rows = load_reference("table1").set_index(["label", "eval_set", "metric"])
    return float(rows.loc[(label, eval_set, name), "printed"])


def write_tree(cfg, results, shifts: dict[tuple[str, str, str], float] | None = None) -> None:
    """Scores whose mean is the paper's number plus a shift in printed units, of every row that is not missing."""
    shifts = shifts or {}
    for row in (TEACHER, STUDENT, TUNED):
        for eval_set in SETS:
            for name, spread in SPREAD.items():
                noise = np.random.default_rng(crc32(f"{eval_set}{name}".encode())).normal(size=NUM)
                noise = spread * (noise - noise.mean()) / noise.std()
                mean = printed(row.label, eval_set, name) + shifts.get((row.label, eval_set, name), 0.0)
                ids = [f"p{i:03d}" for i in range(NUM)]
                scores = pd.DataFrame({"image_id": ids, "prompt_id": ids, "image_seed": 0,
                                       "score": mean / SCALE.get(name, 1.0) + noise})  # fmt: skip
                write_scores(scores_path(cfg, results, row, eval_set, name), scores, row, eval_set, name)


def verdicts(found: dict) -> dict:
    return {(e["label"], e["eval_set"], e["metric"]): (e["verdict"], e.get("plain")) for e in found["cells"]}


AT = (STUDENT.label, "pickapic_test", "pick_score")


def printed_half(name: str) -> float:
    return SCALE.get(name, 1.0) * HALF[name]


@pytest.mark.parametrize(
    ("halves", "expected"),
    [
        (0.0, ("within", "same")),
        (0.6, ("within", "same")),
        (-0.6, ("within", "same")),
        (1.2, ("within", "higher")),  # beyond our interval, not beyond ours and theirs: sqrt(2) of it
        (-1.2, ("within", "lower")),
        (1.7, ("off", "higher")),
        (-1.7, ("off", "lower")),
    ],
)
def test_a_known_shift_has_the_verdict_of_the_rule(tmp_path, halves, expected):
    cfg = paper_config()
    name = "clip_score"  # its last digit is small beside the interval
    at = (STUDENT.label, "pickapic_test", name)
    write_tree(cfg, tmp_path, {at: halves * printed_half(name)})
    found = write(cfg, tmp_path)
    given = verdicts(found)
    assert given.pop(at) == expected
    assert {v for v in given.values() if not v[0].startswith("not measured")} == {("within", "same")}
    assert len(found["off"]) == (expected[0] == "off")


def test_the_rule_by_hand():
    cell = pd.Series({"value": 22.35, "decimals": 2})
    # below the paper: the upper end counts
    found = judge(cell, 22.20, 22.00, 22.30)
    assert found["difference"] == pytest.approx(-0.15)
    assert found["tolerance"] == pytest.approx(2**0.5 * 0.10 + 0.005) and found["verdict"] == "off"
    assert judge(cell, 22.21, 22.00, 22.31)["verdict"] == "within"
    assert judge(cell, 22.60, 22.42, 22.61)["tolerance"] == pytest.approx(2**0.5 * 0.18 + 0.005)  # above: the lower
    assert judge(cell, 22.354, 22.354, 22.354)["verdict"] == "within"  # no spread: the rounding alone
    assert judge(cell, 22.356, 22.356, 22.356)["verdict"] == "off"


def test_a_cell_that_is_off_is_named_wherever_somebody_looks(tmp_path):
    cfg = paper_config()
    write_tree(cfg, tmp_path, {AT: 3 * printed_half("pick_score")})
    found = write(cfg, tmp_path)
    ours = printed(*AT) + 3 * printed_half("pick_score")
    start = f"SDXL-DMD2, PickScore, pickapic_test: ours {ours:.3f} ["
    (line,) = found["off"]
    assert line.startswith(start) and line.endswith("], the paper's 22.35")
    assert told(found) == [
        "calibrate at scale paper, 16 untuned cells: 11 within, 1 off, 4 not measured",
        f"warning: off the paper's: {line}",
    ]
    assert line in (tmp_path / "paper/calibrate.md").read_text()
    assert json.loads((tmp_path / "paper/calibrate.json").read_text())["off"] == [line]
    # the table and its diff, in the file and in what the command prints (its log)
    assert line in tables.write(cfg, tmp_path, "table1")[-1]
    diff.write(cfg, tmp_path, "table1")
    for name in ("table1.md", "table1.diff.md"):
        (warning,) = [li for li in (tmp_path / "paper/tables" / name).read_text().splitlines() if "Warning:" in li]
        assert line in warning and "1 untuned cell is off" in warning
    assert json.loads((tmp_path / "paper/tables/table1.diff.json").read_text())["untuned_off"] == [line]
    # the log of a run of that model, of the command as it is started (which then finds no weights)
    for model in ("sdxl", "sdxl_dmd2"):
        write(cfg, tmp_path, "preference", model)
    assert off_before(load({"scale": "paper"}), "preference", "sdxl", tmp_path) == []
    given = ["--model", "sdxl_dmd2", "--method", "pso_offline", "--set", '{"scale": "paper"}', "--results", "."]
    done = run(sys.executable, "-m", "pso.tune", *given, cwd=tmp_path)
    assert done.returncode == 1
    log = (run_dir("paper", "preference", "sdxl_dmd2", "pso_offline", 0, tmp_path) / "tune.log").read_text()
    assert f"warning: sdxl_dmd2 untuned is off the paper's: {line}" in log and log in done.stderr


def test_a_wrong_scorer_is_found_in_all_of_its_column(tmp_path):
    """As the antialiased CLIP in the place of the paper's: + 0.01 on every picture."""
    cfg = paper_config()
    rows = (TEACHER, STUDENT, TUNED)
    write_tree(cfg, tmp_path, {(r.label, s, "clip_score"): 0.01 for r in rows for s in SETS})
    found = write(cfg, tmp_path)
    off = {key for key, (verdict, _) in verdicts(found).items() if verdict == "off"}
    assert off == {(row.label, s, "clip_score") for row in (TEACHER, STUDENT) for s in SETS}  # untuned rows alone
    text = (tmp_path / "paper/calibrate.md").read_text()
    assert len([line for line in text.splitlines() if line.startswith("- SDXL")]) == len(off)
    assert "sqrt(2)" in text and "quadrature" in text and text.count("**off**") == len(off)


def test_a_model_is_judged_on_the_grid_on_which_it_is_tuned(tmp_path):
    cfg = paper_config()
    write_tree(cfg, tmp_path)
    found = write(cfg, tmp_path, "preference", "sdxl_dmd2")
    assert {e["label"] for e in found["cells"]} == {STUDENT.label} and len(found["cells"]) == 8
    assert found == json.loads((tmp_path / "paper/preference/sdxl_dmd2/calibrate.json").read_text())
    models = cfg.models | {"sdxl_dmd2": ModelEntry.model_construct(title="", tuned_steps=2)}
    assert write(paper_config(models=models), tmp_path, "preference", "sdxl_dmd2")["cells"] == []


def test_what_is_not_measured_is_named_with_its_reason(tmp_path):
    cfg = paper_config()
    cfg.table_entries["table1"].rows[0] = Row(label="SDXL", steps=50, missing="no time")
    write_tree(cfg, tmp_path)
    found = write(cfg, tmp_path)
    given = verdicts(found)
    assert len(given) == 16  # two rows, two sets, four columns: tuned rows are none of it
    assert given["SDXL", "parti_prompts", "clip_score"][0] == "not measured: no time"
    assert given[STUDENT.label, "parti_prompts", "image_reward"][0] == "not measured: no weights"
    assert told(found) == ["calibrate at scale paper, 16 untuned cells: 6 within, 0 off, 10 not measured"]
    text = (tmp_path / "paper/calibrate.md").read_text()
    assert "- not measured: no weights (image reward): SDXL-DMD2" in text and "not measured: no time (PickScore" in text
    other = paper_config(tables=[])
    assert {v for v, _ in verdicts(write(other, tmp_path)).values()} == {
        "not measured: config.tables does not list table1"
    }


def test_a_missing_file_is_a_sentence_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.calibrate", "--results", str(tmp_path), "--set", '{"scale": "paper"}'])
    with pytest.raises(SystemExit, match=r"eval.calibrate: .*pick_score.parquet is not there; make it with `python -m"):
        main()
    assert not (tmp_path / "paper").exists()


@pytest.mark.parametrize(
    ("model", "task", "said"),
    [
        ("sdxl_dmd2", "preferences", "--task is 'preferences', but sdxl_dmd2 has no row for it in .*; expected prefer"),
        ("sdxl", "concept", "--untuned is given, but no row of .* shows sdxl untuned"),
    ],
)
def test_a_model_without_untuned_rows_is_not_calibrated(tmp_path, monkeypatch, model, task, said):
    asked = ["--model", model, "--task", task, "--results", str(tmp_path), "--set", '{"scale": "paper"}']
    monkeypatch.setattr(sys, "argv", ["eval.calibrate", *asked])
    with pytest.raises(SystemExit, match=f"eval.calibrate: {said}"):
        main()
    assert not (tmp_path / "paper").exists()


def test_a_small_scale_warns_of_nothing_and_shows_no_number_of_the_paper(tmp_path):
    scale = "miniature"
    cfg = paper_config(scale)
    write_tree(cfg, tmp_path, {(TEACHER.label, s, name): 1.0 for s in SETS for name in SPREAD})
    found = write(cfg, tmp_path)
    assert found["off"] == [] and not found["held"]
    measured = [e for e in found["cells"] if e["ours"] is not None]
    assert len(measured) == 12 and {e["verdict"] for e in measured} == {"not comparable"}
    assert {e["paper"] for e in found["cells"]} == {None}
    text = (tmp_path / scale / "calibrate.md").read_text()
    cells = load_reference("table1")
    shown = cells[(cells["label"] == STUDENT.label) & (cells["metric"] == "pick_score")]["printed"]
    assert "not comparable" in text and "Paper | Ours | Difference" not in text
    assert not any(re.search(rf"\| {re.escape(number)} +\|", text) for number in shown)
    # SDXL against SDXL-DMD2: raised by 1 here, the paper's own side in words
    ways = {(e["label"], e["metric"], e["verdict"]) for e in found["directions"] if e["eval_set"] == SETS[0]}
    assert ways >= {("SDXL", "pick_score", "disagrees"), ("SDXL", "clip_score", "agrees")}
    assert not any("Warning" in line for line in tables.write(cfg, tmp_path, "table1"))
    assert "untuned_off" not in diff.write(cfg, tmp_path, "table1")
    folder = tmp_path / scale / "tables"
    assert not any("Warning" in (folder / name).read_text() for name in ("table1.md", "table1.tex", "table1.diff.md"))


def test_untuned_rows_of_a_smaller_budget_are_the_papers(tmp_path):
    cfg = paper_config("reduced")
    write_tree(cfg, tmp_path, {AT: 3 * printed_half("pick_score")})
    assert len(write(cfg, tmp_path)["off"]) == 1
    found = diff.write(cfg, tmp_path, "table1")
    assert not found["comparable"] and len(found["untuned_off"]) == 1  # the tuned rows are not


# ---- images and scores: the files of the full job ----


def untuned_only(manifest) -> None:
    content = json.loads(manifest.read_text())
    content["images"] = [entry for entry in content["images"] if entry["method"] == UNTUNED]
    (manifest.parent / "untuned_images.json").write_text(json.dumps(content))
    manifest.unlink()


def test_scores_of_the_untuned_rows_are_kept_by_the_full_job(tmp_path):
    cfg, model = test_score.config(), test_score.MODEL
    folder = tmp_path / "smoke/preference" / model
    test_score.write_run(tmp_path)
    untuned_only(folder / "images.json")
    score(cfg, model, tmp_path, "preference", untuned=True)
    before = test_score.files(tmp_path)
    assert {path.parts[-6] for path in before} == {UNTUNED} and len(before) == 6
    assert json.loads((folder / "untuned_scores.json").read_text())["cost"]["scores_made"] == 36
    assert not (folder / "scores.json").exists()
    with pytest.raises(UserError, match="images.json is missing; `python -m eval.generate --model sdxl_lcm --set"):
        score(cfg, model, tmp_path, "preference")
    test_score.write_run(tmp_path)
    score(cfg, model, tmp_path, "preference")
    after = test_score.files(tmp_path)
    assert len(after) == 12 and {path: after[path] for path in before} == before
    assert json.loads((folder / "scores.json").read_text())["cost"]["scores_made"] == 36  # of the tuned rows


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Generation with a network that paints a colour for each prompt; how many blocks it made."""
    made = Counter()

    def paint(policy, chain, block, size, conditions):
        made["blocks"] += 1
        return [Image.new("RGB", (8, 8), (i, 0, 0)) for i, _ in enumerate(block)]

    policy = SimpleNamespace(unet_forwards=0, unload_lora=lambda: None, load_lora=lambda path: None,
                             truncated_prompts=lambda texts: 0, sampling=contextlib.nullcontext)  # fmt: skip
    changed = {
        "load_policy": lambda *args, **more: policy,
        "chain_for": lambda *args: None,
        "KeptTexts": lambda *args: SimpleNamespace(rows=None, inputs=[]),
        "sample_block": paint,
        "eval_prompts": lambda hub, entry, name, subject: prompts_of(["a", "b", "c"], name),
    }
    for name, value in changed.items():
        monkeypatch.setattr(generate_module, name, value)
    for job in jobs(test_score.config()):
        if job.method != UNTUNED:
            lora = job.lora("smoke", tmp_path)
            lora.parent.mkdir(parents=True, exist_ok=True)
            lora.write_bytes(b"lora")
    return made


def test_images_of_the_untuned_rows_are_kept_by_the_full_job(tmp_path, drawn):
    cfg, model = test_score.config(), test_score.MODEL
    folder = tmp_path / "smoke/preference" / model
    generate(cfg, model, tmp_path, "preference", untuned=True)
    told_of = json.loads((folder / "untuned_images.json").read_text())
    assert [e["method"] for e in told_of["images"]] == [UNTUNED] * 2 and not (folder / "images.json").exists()
    assert (told_of["cost"]["images"], told_of["cost"]["kept"]) == (12, 0)
    shards = {path: (path.stat().st_mtime_ns, sha256_of(path)) for path in tmp_path.rglob("shard*.parquet")}
    assert {path.parts[-6] for path in shards} == {UNTUNED}
    generate(cfg, model, tmp_path, "preference")
    full = json.loads((folder / "images.json").read_text())
    assert (full["cost"]["images"], full["cost"]["kept"]) == (12, 12)  # those of the tuned row, the untuned row's
    assert {path: (path.stat().st_mtime_ns, sha256_of(path)) for path in shards} == shards
    assert [e for e in full["images"] if e["method"] == UNTUNED] == told_of["images"]
    blocks = drawn["blocks"]
    generate(cfg, model, tmp_path, "preference", untuned=True)
    assert drawn["blocks"] == blocks and len(list(tmp_path.rglob("shard*.parquet"))) == 4


def test_a_model_without_untuned_rows_is_a_sentence(tmp_path):
    cfg = load({"scale": "paper", "tables": ["table3"]})
    with pytest.raises(UserError, match="--untuned is given, but no row of table3 shows sdxl untuned"):
        generate(cfg, "sdxl", tmp_path, "concept", untuned=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "x", "--untuned"], "--untuned is given without a value; with --images it names the untuned"),
        (["--model", "sdxl_dmd2", "--untuned", "x"], "--untuned given with --model, which takes no such option"),
        (["--model", "sdxl_dmd2", "--untuned", "--hub", "x"], "--hub given with --model, which takes no such option"),
    ],
)
def test_untuned_means_a_folder_for_pictures_and_nothing_for_a_model(arguments, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.score", *arguments])
    with pytest.raises(SystemExit, match=said):
        score_main()


# ---- the workflow ----


def job_blocks(output: str) -> list[tuple[str, dict[str, str]]]:
    """(rule, its lines) of every job that `snakemake -n` prints."""
    found = []
    for part in re.split(r"^(?:local)?rule (?=\w+:)", output, flags=re.MULTILINE)[1:]:
        lines = dict(re.findall(r"^    (\w+): (.*)$", part, re.MULTILINE))
        found.append((part.partition(":")[0], lines))
    return found


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Jobs of a dry run in an empty folder, each made once."""
    made = {}

    def jobs_of(scale: str, *targets: str) -> list[tuple[str, dict[str, str]]]:
        if (scale, *targets) not in made:
            done = snakemake("-n", *targets, cwd=tmp_path_factory.mktemp("dry"), scale=scale)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            made[scale, *targets] = job_blocks(done.stdout + done.stderr)
        return made[scale, *targets]

    return jobs_of


def test_every_run_of_published_weights_waits_for_its_models_calibration(dry):
    found = dry("paper")
    rules = Counter(rule for rule, _ in found)
    assert rules["tune"] > 100 and rules["calibrate_model"] == rules["generate_untuned"] == rules["score_untuned"] == 5
    made = {lines["output"] for rule, lines in found if rule == "calibrate_model"}
    waits = {}
    for rule, lines in found:
        if rule == "tune":
            task, model = re.search(r"task=(\S+), model=(\w+)", lines["wildcards"]).groups()
            named = [path for path in lines["input"].split(", ") if path.endswith("calibrate.json")]
            waits[task.split("/")[0], model] = named
    assert waits == {
        **{("preference", m): [f"results/paper/preference/{m}/calibrate.json"]
           for m in ("sdxl", "sdxl_dmd2", "sdxl_turbo", "sdxl_lcm")},
        ("concept", "sdxl_turbo"): ["results/paper/concept/sdxl_turbo/calibrate.json"],
        ("concept", "sdxl"): ["results/paper/preference/sdxl/calibrate.json"],  # Table 3 has no untuned SDXL
    }  # fmt: skip
    assert {path for paths in waits.values() for path in paths} == made
    # and the full jobs come after those of the untuned rows
    for rule, what in (("generate", "images"), ("score", "scores")):
        after = [lines["input"] for name, lines in found if name == rule and f"untuned_{what}.json" in lines["input"]]
        assert len(after) == 5 and all(f"untuned_{what}.json" in given for given in after)


def test_calibration_alone_trains_nothing(dry):
    rules = Counter(rule for rule, _ in dry("paper", "calibrate"))
    assert not {"tune", "latents", "embeddings", "preference_model"} & set(rules)
    assert rules["calibrate"] == 1 and rules["score_untuned"] == rules["generate_untuned"] == 5
    assert rules["score"] == rules["generate"] == 6  # models of which no row is tuned: they have one job


def test_the_jobs_of_the_small_scales_are_as_they_were(dry):
    found = dry("smoke")
    assert {"calibrate", "calibrate_model", "generate_untuned", "score_untuned"} & {rule for rule, _ in found} == set()
    given = " ".join(lines.get("input", "") for _, lines in found)
    assert "untuned" not in given and "calibrate" not in given
    assert {"generate_untuned", "score_untuned", "calibrate"} <= {rule for rule, _ in dry("smoke", "calibrate")}


def test_a_new_calibration_trains_nothing_anew(tmp_path):
    """Scorers may change after a run; its LoRA does not depend on them."""
    lora = "results/paper/preference/sdxl_dmd2/pso_offline/seed0/lora/pytorch_lora_weights.safetensors"
    first = job_blocks(snakemake("-n", lora, cwd=tmp_path, scale="paper").stdout)
    for _, lines in first:  # as if all of it had been made, in order
        for path in lines["output"].split(", "):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("{}")
    (tmp_path / "results/paper/preference/sdxl_dmd2/calibrate.json").write_text("{}")  # newer than the LoRA

    def planned(*more: str) -> str:
        done = snakemake("-n", lora, *more, "--rerun-triggers", "mtime", cwd=tmp_path, scale="paper")
        return done.stdout + done.stderr

    assert "Nothing to be done" in planned()
    again = {rule for rule, _ in job_blocks(planned("--forcerun", "score_untuned"))}
    assert again == {"score_untuned", "calibrate_model"}


def test_only_published_weights_have_something_to_wait_for():
    assert calibrations(load({"scale": "smoke"}), "preference", "sdxl_dmd2") == []
    assert calibrations(load({"scale": "paper"}), "published", "sdxl_stochastic") == []
    own = load({"scale": "reduced", "tables": ["table2"]})
    assert [str(path) for path in calibrations(own, "style", "sdxl_turbo")] == [
        "results/reduced/preference/sdxl_turbo/calibrate.json"
    ]
    assert calibrations(own, "preference", "sdxl_dmd2") == []


# ---- what runs left out ----


def test_a_run_that_dropped_rows_says_so_in_its_table(tmp_path):
    cfg = paper_config("miniature")
    write_tree(cfg, tmp_path)
    tables.write(cfg, tmp_path, "table1")
    plain = (tmp_path / "miniature/tables/table1.md").read_text()
    record = run_dir("miniature", "preference", TUNED.model, TUNED.method, 0, tmp_path) / "run.json"
    for dropped, said in (
        ({"tie": 9, "missing_caption": 0}, None),
        ({"tie": 9, "missing_caption": 4, "undecodable_image_0": 8},
         "Offline-PSO w/ SDXL-DMD2, seed 0: 12 training rows dropped (undecodable_image_0 8, missing_caption 4)."),
    ):  # fmt: skip
        record.write_text(json.dumps({"data": {"rows": 99, "pairs": 90, "dropped": dropped}}))
        tables.write(cfg, tmp_path, "table1")
        text = (tmp_path / "miniature/tables/table1.md").read_text()
        assert text == plain if said is None else [line for line in text.splitlines() if said in line] == [f"- {said}"]
        latex = (tmp_path / "miniature/tables/table1.tex").read_text()
        assert (r"undecodable\_image\_0 8" in latex) == (said is not None)


def test_a_run_without_counts_has_no_note():
    assert dropped_note({"data": {"prompts": 4000}}) is None and dropped_note({}) is None
    assert dropped_note({"data": {"dropped": {"bad_label": 1}}}) == "1 training row dropped (bad_label 1)"


def test_what_the_untuned_rows_cost_is_counted_where_they_were_made_alone(tmp_path):
    cfg = test_score.config()
    folder = tmp_path / "smoke/preference" / test_score.MODEL
    names = ["pso_offline/seed0/run", "images", "scores"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps({"cost": {"wall_s": 10.0}}))
    assert sum(one["wall_s"] for one in records(cfg, tmp_path)) == 30
    (folder / "untuned_images.json").write_text(json.dumps({"cost": {"wall_s": 5.0}}))
    found = records(cfg, tmp_path)
    assert sum(one["wall_s"] for one in found) == 35
    assert [stage(one["job"]) for one in found].count("images") == 2
    (folder / "untuned_images.json").write_text('{"cost"')
    with pytest.raises(UserError, match=r"untuned_images\.json is no JSON \(.*; delete it"):
        records(cfg, tmp_path)
