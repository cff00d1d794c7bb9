"""Model cards: what they say is what was run, scored and licensed, and their code draws our picture."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import cards
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cards import COUNTS, RUN, folder_of, write_run, write_tables
from conftest import ROOT
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from pso import card as card_module
from pso import rollout as rollouts
from pso.campaign import Run, runs
from pso.card import text_of, write
from pso.card_metadata import problems
from pso.config import load
from pso.hub import Hub, hub_dir
from pso.leaks import leaks
from pso.licences import IDS, Licence, Source, inherited
from pso.models import chain_for, load_policy
from pso.paths import LORA_FILE, card_file, images_dir
from pso.policy import to_images
from pso.provenance import UserError
from pso.rollout import rollout

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
BASES = {"sdxl_dmd2": [BASE, "tianweiy/DMD2"], "sdxl_lcm": [BASE, "latent-consistency/lcm-sdxl"], "sdxl": BASE,
         "sdxl_turbo": "stabilityai/sdxl-turbo"}  # fmt: skip


@pytest.fixture(scope="module")
def paper():
    return load({"scale": "paper"})


@pytest.fixture(scope="module")
def smoke_config():
    return load({"scale": "smoke"})


def made(config, results, run=RUN, **more) -> str:
    write_run(config, results, run)
    write_tables(config, results, **more)
    return text_of(config, run, results)


def code_of(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def lines_of(text: str, heading: str) -> list[str]:
    return re.search(rf"^## {heading}\n\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1].splitlines()


# ---- metadata ----

LICENCES = {
    "sdxl_dmd2": ("other", "creativeml-open-rail++-m-and-cc-by-nc-4.0-family", "https://huggingface.co/tianweiy/DMD2"),
    "sdxl_lcm": ("openrail++", None, None),
    "sdxl": ("openrail++", None, None),
    "sdxl_turbo": ("other", "stability-ai-non-commercial-as-it-was-issued",
                   "https://huggingface.co/stabilityai/sdxl-turbo"),
}  # fmt: skip


@pytest.mark.parametrize("scale", ["paper", "smoke"])
@pytest.mark.parametrize("model", list(BASES))
def test_the_hub_reads_whose_adapter_it_is_and_on_what_terms(tmp_path, model, scale):
    method = "sft" if model == "sdxl" else "pso_offline"
    config = load({"scale": scale})
    data = ModelCard(made(config, tmp_path, Run("preference", model, method, 0)), ignore_metadata_errors=False).data
    assert data.base_model == BASES[model] and data["base_model_relation"] == "adapter"
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert (data.license, data.license_name, data.license_link) == LICENCES[model]
    assert data.datasets == ["yuvalkirstain/pickapic_v2"]
    assert {"lora", "stable-diffusion-xl", "pso-bench", method, model} <= set(data.tags)
    assert ("few-step" in data.tags) == (model != "sdxl") and ("pso" in data.tags) == (method == "pso_offline")
    assert ("stand-in" in data.tags) == (scale == "smoke")


def test_the_model_index_is_the_csv_and_survives_the_hubs_own_parser(tmp_path, paper):
    run = Run("preference", "sdxl_turbo", "pso_online", 0)
    text = made(paper, tmp_path, run)
    data = ModelCard(text, ignore_metadata_errors=False).data
    again = eval_results_to_model_index(data.model_name, data.eval_results)
    name, parsed = model_index_to_eval_results(again)
    assert (name, parsed) == (data.model_name, data.eval_results)
    frame = write_tables(paper, tmp_path)["table2"]
    rows = frame[(frame["model"] == run.model) & (frame["method"] == run.method)]
    measured = paper.table_entries["table2"].metrics
    expected = {
        (row.eval_set, 4 if "4step" in row.label else 1, m): (getattr(row, m), getattr(row, f"{m}_low"))
        for row in rows.itertuples()
        for m in measured
    }
    found = {
        (r.dataset_name, int(r.dataset_config.split()[-2]), r.metric_type): (r.metric_value, r.metric_args["low_95"])
        for r in parsed
        if r.metric_type in measured
    }
    assert found == expected and len(expected) == 16


def test_data_that_is_no_data_set_of_the_hub_is_named_in_words_alone(tmp_path, paper):
    text = made(paper, tmp_path, Run("preference", "sdxl_dmd2", "pso_online", 0))
    assert ModelCard(text).data.datasets is None
    assert "[RockeyCoss/SPO](https://github.com/RockeyCoss/SPO) | MIT |" in text


WRONG = [
    (r"^license: other\n", "", "has license None"),
    (r"^license: other\n", "license: cc-by\n", "has license 'cc-by'; expected one of openrail++"),
    (r"^license_name: .*\n", "", "without license_name and a license_link"),
    (r"^license_link: .*\n", "license_link: LICENSE\n", "without license_name and a license_link"),
    (r"^- tianweiy/DMD2\n", "", "has base_model ['stabilityai/stable-diffusion-xl-base-1.0']; expected"),
    (r"^- tianweiy/DMD2\n", "- tianweiy/DMD\n", "has base_model"),
    (r"^- tianweiy/DMD2\n", "- ./my_unet\n", "has base_model"),
    (r"^base_model_relation: adapter\n", "base_model_relation: finetune\n", "has base_model_relation 'finetune'"),
    (r"^library_name: diffusers\n", "", "has library_name None; expected 'diffusers'"),
    (r"^pipeline_tag: text-to-image\n", "", "has pipeline_tag None"),
    (r"^- lora\n", "", "has tags"),
    (r"^    - type: pick_score\n", "    - kind: pick_score\n", "has metadata that huggingface_hub cannot read"),
    (r"^license: other\n", "license: [other\n", "has metadata that huggingface_hub cannot read"),
    (r"(?s)^---\n\n# .*", "---\n", "says nothing below its metadata"),
]


@pytest.mark.parametrize(("pattern", "instead", "named"), WRONG, ids=[w[2][:30] + w[1][:12] for w in WRONG])
def test_wrong_metadata_are_named(tmp_path, paper, pattern, instead, named):
    text, bases = made(paper, tmp_path), BASES["sdxl_dmd2"]
    assert problems(text, bases) == []
    wrong = re.sub(pattern, instead, text, count=1, flags=re.MULTILINE)
    assert wrong != text
    assert named in problems(wrong, bases)[0]


@pytest.mark.parametrize("base", ["./my_unet", "/" + "data/me/unet", "a/b/c", "a b"])
def test_a_base_model_that_is_no_repositorys_id_is_named(tmp_path, paper, base):
    text = made(paper, tmp_path).replace("- tianweiy/DMD2\n", f"- {base}\n", 1)
    assert problems(text, [BASE, base]) == [f"has base_model {base!r}, which is no repository's id"]


def test_a_card_that_fails_its_own_check_is_not_written(tmp_path, monkeypatch):
    config = load({"scale": "paper", "tables": ["table2"]})
    for run in runs(config):
        write_run(config, tmp_path, run)
    write_tables(config, tmp_path)
    monkeypatch.setattr(card_module, "inherited", lambda found: Licence("none-such"))
    with pytest.raises(UserError, match="has license 'none-such'"):
        write(config, tmp_path)
    assert list(tmp_path.rglob("README.md")) == []


# ---- licences ----


def source(licence: str, non_commercial: bool = False, weights: bool = True, repo: str = "a/b") -> Source:
    return Source("base model", repo, licence, non_commercial, f"https://huggingface.co/{repo}", weights=weights)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([source("MIT")], Licence("mit")),
        ([source("MIT"), source("CreativeML Open RAIL++-M")], Licence("openrail++")),  # the stricter goes with it
        ([source("MIT"), source("Apache-2.0")], Licence("other", "mit-and-apache-2.0", "https://huggingface.co/a/b")),
        # one licence of the Hub's, but no commercial use: said by name
        ([source("CC BY-NC 4.0", True)], Licence("other", "cc-by-nc-4.0", "https://huggingface.co/a/b")),
        ([source("unstated")], Licence("other", "unstated", "https://huggingface.co/a/b")),
        ([source("MIT"), source("unstated", repo="c/d")], Licence("other", "unstated", "https://huggingface.co/c/d")),
        # the link is the strictest's, wherever it stands
        (
            [source("CreativeML Open RAIL++-M"), source("Own terms", True, repo="c/d")],
            Licence("other", "creativeml-open-rail++-m-and-own-terms", "https://huggingface.co/c/d"),
        ),
        # a judge of unstated terms is named in the table; data that exclude commercial use count
        ([source("MIT"), source("unstated", weights=False)], Licence("mit")),
        (
            [source("MIT"), source("NC data", True, weights=False, repo="c/d")],
            Licence("other", "nc-data", "https://huggingface.co/c/d"),
        ),
    ],
)
def test_what_is_inherited(found, expected):
    assert inherited(found) == expected


def test_every_repository_behind_the_weights_is_named_with_its_terms(tmp_path, paper):
    told = "\n".join(lines_of(made(paper, tmp_path, Run("preference", "sdxl_dmd2", "pso_online", 0)), "Licence"))
    for repo in (
        BASE,
        "tianweiy/DMD2",
        "madebyollin/sdxl-vae-fp16-fix",
        "RockeyCoss/SPO",
        "yuvalkirstain/PickScore_v1",
    ):
        assert f"[{repo}](https://" in told, repo
    assert "**No commercial use**: tianweiy/DMD2." in told
    assert re.search(r"PickScore_v1\) \| none stated by its owners", told)


def test_a_repository_without_entry_is_unknown_and_said_to_be(tmp_path):
    config = load({"scale": "smoke", "models": {"sdxl_dmd2": {"unet": {"repo": "my/own"}}}})
    text = made(config, tmp_path)
    assert ModelCard(text).data.license_name.endswith("and-unknown")
    assert "| UNet | my/own | unknown: repositories.yaml has no entry of it |" in text


OWN = "./my_unet"


def test_weights_in_a_folder_of_ones_own_are_no_base_model_and_have_no_page(tmp_path):
    config = load({"scale": "paper", "models": {"sdxl_dmd2": {"unet": {"repo": str(tmp_path / OWN), "file": None}}}})
    text = made(config, tmp_path)
    data = ModelCard(text).data
    assert data.base_model == BASE and str(tmp_path) not in text and leaks(text) == []
    assert (data.license, data.license_name) == ("other", "creativeml-open-rail++-m-and-unknown")
    assert data.license_link is None  # it would be theirs
    assert f"| UNet | {OWN} | unknown: a folder of its maker's own |" in text
    assert f"Not of the Hub, but of its maker's own: `{OWN}`." in text
    assert f'UNet2DConditionModel.from_pretrained("{OWN}", torch_dtype=torch.float16)' in code_of(text)[0]
    other = load({"scale": "paper", "models": {"sdxl_dmd2": {"loras": [{"repo": OWN, "file": "w.safetensors"}]}}})
    data = ModelCard(made(other, tmp_path / "other")).data  # the strictest terms are of somebody else
    assert data.base_model == BASES["sdxl_dmd2"] and data.license_link == "https://huggingface.co/tianweiy/DMD2"


def test_a_pipeline_of_ones_own_alone_names_no_base_model(tmp_path):
    config = load({"scale": "paper", "models": {"sdxl_turbo": {"base": OWN}}})
    text = made(config, tmp_path, Run("preference", "sdxl_turbo", "pso_offline", 0))
    assert ModelCard(text).data.base_model is None and f'base = "{OWN}"' in code_of(text)[0]


def test_the_ids_are_of_licences_that_repositories_have(paper):
    licences = {entry.licence for entry in paper.repositories.values()}
    assert {"MIT", "Apache-2.0", "CreativeML Open RAIL++-M"} <= licences & set(IDS)


# ---- words ----


def test_scores_stand_beside_those_of_the_untuned_row(tmp_path, paper):
    text = made(paper, tmp_path)
    frame = write_tables(paper, tmp_path)["table1"].set_index(["eval_set", "label"])["pick_score"]
    for eval_set in ("pickapic_test", "parti_prompts"):
        part = text.partition(f"### {eval_set}, 4 steps (`table1`)")[2].partition("###")[0]
        cells = [c.strip() for c in re.search(r"^\| ↑ PickScore +\|(.*)\|$", part, re.MULTILINE)[1].split("|")]
        for cell, label in zip(cells, ["Offline-PSO w/ SDXL-DMD2", "SDXL-DMD2"], strict=True):
            mean = frame[eval_set, label]
            assert cell == f"{mean:.2f} [{mean - 0.125:.2f}, {mean + 0.125:.2f}]", (eval_set, label)
        assert "Means over 24 prompts and 288 pictures; in brackets" in part


def test_the_settings_data_and_dropped_rows_are_the_runs(tmp_path, paper):
    text = made(paper, tmp_path)
    for row in ("| updates | 5,000 |", "| learning rate | 1e-05, constant (AdamW) |", "| batch of an update | 64 |",
                "| training seed | 0 |", "| training reward | none |"):  # fmt: skip
        assert row in text
    assert re.search(r"\| objective \| .*beta 50, .*pair_shares_eps yes \|", text)
    assert "- pairs: 55" in text and "- rows dropped: 5 (tie 2, missing caption 3)" in text
    assert COUNTS["dropped"]["bad_label"] == 0 and "bad label" not in text
    assert "`pso/pso_offline.py`: Offline PSO (Eq. 6" in text


def test_what_run_json_says_goes_before_the_configuration(tmp_path, paper):
    write_run(paper, tmp_path)
    write_tables(paper, tmp_path)
    changed = load({"scale": "paper", "methods": {"pso_offline": {"tune": {"learning_rate": 3.0}}}})
    assert "| learning rate | 1e-05," in text_of(changed, RUN, tmp_path)


def test_several_training_seeds_and_few_prompts_are_said(tmp_path, paper):
    text = made(paper, tmp_path, num_runs=3)
    assert "288 pictures; tuned: also over 3 training seeds, of which this is one;" in text
    assert "they do not cover the training seed, of which there are 3" in text
    assert "Measured on few prompts, 24 at the least" in text
    assert all(result.dataset_args["num_training_seeds"] == 3 for result in ModelCard(text).data.eval_results)
    assert "num_training_seeds" not in made(paper, tmp_path / "one")


def test_loss_of_diversity_is_said(tmp_path, paper):
    config = load({"scale": "miniature"})  # several pictures of a prompt, so that it is measured
    write_run(config, tmp_path)
    frame = write_tables(config, tmp_path)["table1"]
    path = tmp_path / "miniature/tables/table1.csv"
    tuned = (frame["label"] == "Offline-PSO w/ SDXL-DMD2") & (frame["eval_set"] == "parti_prompts")
    frame.loc[tuned, "diversity"] = 0.125
    frame.to_csv(path, index=False)
    told = lines_of(text_of(config, RUN, tmp_path), "Limits")
    (line,) = [line for line in told if "parti_prompts" in line]
    assert "differ by 0.125 on parti_prompts with 4 steps" in line and line.endswith(
        ": less diverse than before tuning."
    )
    (line,) = [line for line in told if "pickapic_test" in line]
    assert line.endswith("not less diverse than before tuning.")
    assert "- Whether it draws fewer different pictures of a prompt was not measured." in made(paper, tmp_path)


def test_a_training_reward_is_no_evidence(tmp_path, paper):
    text = made(paper, tmp_path, Run("preference", "sdxl_dmd2", "pso_online", 0))
    assert "↑ PickScore ‡" in text and "‡ Judges as the training reward does" in text
    assert "trained to score high by PickScore" in text
    text = made(paper, tmp_path, Run("preference", "sdxl_dmd2", "spo_transplant", 0))  # on a copy of it
    assert "↑ PickScore ‡" in text and text.count("‡") == 3 and "trained to score high by SPM (released)" in text
    assert "‡" not in made(paper, tmp_path)


def test_a_toy_says_first_that_it_is_one(tmp_path, paper, smoke_config):
    text = made(smoke_config, tmp_path)
    body = text.split("\n---\n")[1].split("\n\n")
    assert body[1].startswith("> **Not a model for use.**") and "toy world" in body[1] and "useless" in body[1]
    assert smoke_config.scale_entry.caption.rstrip(".") in body[1]
    assert "Not a model for use" not in made(paper, tmp_path)


def test_a_subjects_card_is_of_its_own_lora(smoke, smoke_config):
    subjects = smoke_config.table_entries["table3"].subjects
    text = text_of(smoke_config, Run(f"concept/{subjects[0]}", "sdxl_turbo", "pso", 0), smoke / "results")
    assert f"of {len(subjects)} subjects, each with its own LoRA, of which this is one" in text
    prompt = ModelCard(text).data["instance_prompt"]
    assert prompt.startswith("A photo of [V] ") and f'pipe("{prompt}", num_inference_steps=4' in text


@pytest.mark.parametrize("scale", ["paper", "smoke"])
def test_a_card_tells_nothing_of_the_machine_and_is_the_same_twice(tmp_path, scale):
    config = load({"scale": scale})
    text = made(config, tmp_path)
    assert leaks(text) == [] and str(tmp_path) not in text
    assert text_of(config, RUN, tmp_path) == text
    assert max(len(line) for line in "".join(code_of(text)).splitlines()) < 200


# ---- what is missing or does not belong together ----


def drop(name):
    return lambda folder, results: (folder / name).unlink()


def no_table(folder, results):
    (results / "paper/tables/table1.csv").unlink()


def other_lora(folder, results):
    shard = images_dir(folder, "parti_prompts", 4) / "shard0.parquet"
    shard.parent.mkdir(parents=True)
    schema = pa.schema([("a", pa.int64())], metadata={b"pso_bench": json.dumps({"lora": "0" * 64})})
    pq.write_table(pa.Table.from_pylist([], schema), shard)


def no_model(folder, results):
    record = json.loads((folder / "run.json").read_text())
    del record["config"]["model"]["sdxl_dmd2"]["base"]
    (folder / "run.json").write_text(json.dumps(record))


def record_without(*keys):
    def spoil(folder, results):
        record = json.loads((folder / "run.json").read_text())
        inner = record
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        (folder / "run.json").write_text(json.dumps(record))

    return spoil


def cut_off(folder, results):
    path = folder / "run.json"
    path.write_text(path.read_text()[:-9])


def table_without_row(label):
    def spoil(folder, results):
        path = results / "paper/tables/table1.csv"
        frame = pd.read_csv(path)
        frame[frame["label"] != label].to_csv(path, index=False)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (
            drop("run.json"),
            r"run\.json is not there, so the run is not finished; `python -m pso\.tune --task preference",
        ),
        (drop(f"lora/{LORA_FILE}"), r"safetensors is not there, so the run is not finished"),
        (no_table, r"table1\.csv is not there; `snakemake --cores 2 table1 --config scale=paper` makes it"),
        (other_lora, r"shard0\.parquet was drawn with another LoRA"),
        (cut_off, r"run\.json is no JSON \(.*; `python -m pso\.tune .* makes it anew"),
        (record_without("lora_parameters"), r"run\.json lacks lora_parameters; `python -m pso\.tune"),
        (record_without("config", "method", "pso_offline"), r"run\.json lacks config\.method\.pso_offline; "),
        (table_without_row("Offline-PSO w/ SDXL-DMD2"), r"table1\.csv has no row 'Offline-PSO w/ SDXL-DMD2' on "),
        (table_without_row("SDXL-DMD2"), r"table1\.csv has no row 'SDXL-DMD2' on pickapic_test; `snakemake"),
        (no_model, r"run\.json: config\.model\.sdxl_dmd2\.base is missing"),
    ],
)
def test_what_is_missing_is_one_sentence(tmp_path, paper, spoil, named):
    made(paper, tmp_path)
    spoil(folder_of(paper, tmp_path), tmp_path)
    with pytest.raises(UserError, match=named):
        text_of(paper, RUN, tmp_path)


def test_the_command_writes_the_card_of_every_tuned_run(tmp_path):
    settings = {"scale": "smoke", "tables": ["table2"]}
    config = load(settings)
    for run in runs(config):
        write_run(config, tmp_path, run)
    write_tables(config, tmp_path)
    command = [sys.executable, "-m", "pso.card", "--set", json.dumps(settings), "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cards_there = {card_file(folder_of(config, tmp_path, run)) for run in runs(config)}
    assert set(tmp_path.rglob("README.md")) == cards_there and len(cards_there) == 7
    (folder_of(config, tmp_path, runs(config)[0]) / "run.json").unlink()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("card: ") and "Traceback" not in done.stderr


def card_command(run, settings, folder) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pso.card", "--run", str(run.relative_to(folder)), "--set", json.dumps(settings)]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


@pytest.mark.parametrize("run", [dataclasses.replace(RUN, seed=3), Run("published", "sdxl", "mapo_transplant", 0)])
def test_a_run_that_no_table_shows_gets_its_card_by_its_folder_and_no_scores_of_others(tmp_path, run):
    config = load({"scale": "smoke"})
    assert run not in runs(config)
    write_tables(config, tmp_path / "results")  # of other seeds
    folder = write_run(config, tmp_path / "results", run)
    done = card_command(folder, {}, tmp_path)
    assert done.returncode == 0 and done.stdout == f"wrote {card_file(folder).relative_to(tmp_path)}\n", done.stderr
    text = card_file(folder).read_text()
    assert lines_of(text, "Scores") == ["No table that was asked for has numbers of it.", ""]
    assert ModelCard(text).data.eval_results is None and f"training seed {run.seed}" in text
    assert set(tmp_path.rglob("README.md")) == {card_file(folder)}


def test_a_run_whose_tables_are_not_made_gets_its_card_and_is_told_so(tmp_path):
    config = load({"scale": "smoke", "tables": ["table1", "table2"]})
    folder = write_run(config, tmp_path / "results")
    assert card_command(folder, {"tables": ["table1", "table2"]}, tmp_path).returncode == 0
    assert lines_of(card_file(folder).read_text(), "Scores")[:3] == [
        "No table that is made has numbers of it.", "", "Not made yet, though they show it: table1.",
    ]  # fmt: skip
    write_tables(config, tmp_path / "results")
    assert card_command(folder, {"tables": ["table1", "table2"]}, tmp_path).returncode == 0
    assert card_file(folder).read_text() == text_of(config, RUN, tmp_path / "results")
    assert "### pickapic_test, 4 steps (`table1`)" in card_file(folder).read_text()


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path):
    done = card_command(tmp_path / "results/smoke", {}, tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("card: RUN is 'results/smoke'; expected the folder of a run")


# ---- the code ----


@pytest.mark.parametrize("scale", ["paper", "rehearsal", "miniature"])
@pytest.mark.parametrize("model", list(BASES))
def test_the_code_is_python_and_names_files_that_are_fetched(tmp_path, model, scale):
    config = load({"scale": scale})
    method = "sft" if model == "sdxl" else "diffusion"
    first, second = code_of(made(config, tmp_path, Run("preference", model, method, 0)))
    compile(first, "first", "exec")
    assert len(second.splitlines()) == 3 and second.startswith("pipe.load_lora_weights(")
    compile(second, "second", "exec")
    assert ("results/" in first) == (scale != "paper")
    assert ("torch.float16" in first) == ('pipe.to("cuda")' in first) == (scale != "miniature")
    assert ('variant="fp16"' in first) == (scale == "paper")
    if model == "sdxl_dmd2" and scale == "paper":
        assert 'hf_hub_download("tianweiy/DMD2", "dmd2_sdxl_4step_unet_fp16.bin")' in first
        assert "timesteps=[999, 749, 499, 249], guidance_scale=0.0, height=1024" in second


@pytest.mark.parametrize("scale", ["paper", "miniature"])
def test_the_code_reads_a_folder_of_ones_own_where_it_is(tmp_path, scale):
    below = "./results/miniature/preference/sdxl_dmd2/pso_offline/seed0/lora"
    unet = {"repo": OWN, "file": "w.safetensors"}
    weights = {"unet": unet, "loras": [{"repo": below, "file": LORA_FILE}]}
    first, _ = code_of(made(load({"scale": scale, "models": {"sdxl_dmd2": weights}}), tmp_path))
    compile(first, "first", "exec")
    assert f'pipe.load_lora_weights("{below}", weight_name="{LORA_FILE}"' in first
    assert f'file = "{OWN}/w.safetensors"' in first and "hf_hub_download" not in first


# a difference and a LoRA below ours, which no shipped model that is tuned has; strong enough to be seen
EVERY_LAYER = load({"scale": "smoke"}).models["sdxl_dmd2"].lora_targets
TUNABLE = {"tuned_steps": 4, "lora_rank": 16, "lora_targets": EVERY_LAYER}
DELTA = {"repo": "mhdang/dpo-sdxl-text2image-v1", "subfolder": "unet", "minus": BASE, "scale": 300.0}
BELOW = {"repo": "tianweiy/DMD2", "file": "dmd2_sdxl_4step_lora_fp16.safetensors", "scale": 300.0}
COMPOSED = {
    "sdxl_dpo_dmd2_lora": {**TUNABLE, "loras": [BELOW]},
    "sdxl_turbo_dpo_delta": {**TUNABLE, "deltas": [DELTA]},
}


@dataclasses.dataclass
class Drawn:
    """A picture, and the latents that the VAE was given: a barely trained one shows little of them."""

    picture: np.ndarray
    latents: torch.Tensor

    def apart(self, other: "Drawn") -> float:
        return float((self.latents - other.latents).norm() / other.latents.norm())


def watch(vae, monkeypatch) -> list[torch.Tensor]:
    seen, decode = [], vae.decode
    monkeypatch.setattr(vae, "decode", lambda x, *a, **k: seen.append(x.clone()) or decode(x, *a, **k))
    return seen


def drawn_by_the_card(text: str, folder, monkeypatch) -> Drawn:
    """By the card's two blocks as they are, run where results/ lies; the noise is torch's, from seed 0."""
    first, second = code_of(text)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(first, "first", "exec"), names)
    seen = watch(names["pipe"].vae, monkeypatch)
    names["pipe"].set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    exec(compile(second, "second", "exec"), names)
    assert (folder / "picture.png").exists()
    return Drawn(np.asarray(names["picture"]).astype(int), seen[0])


def drawn_by_us(config, model: str, lora, prompt: str, monkeypatch) -> Drawn:
    """By our sampler, its noise drawn as diffusers draws it."""
    entry = config.models[model]
    policy = load_policy(entry, Hub(hub_dir(config.scale)), name=model)
    policy.load_lora(lora.parent)
    seen = watch(policy.pipeline.vae, monkeypatch)
    torch.manual_seed(0)
    monkeypatch.setattr(rollouts, "keyed_noise", lambda keys, step, shape: torch.randn(len(keys), *shape))
    latents = rollout(policy, chain_for(model, entry, entry.tuned_steps), policy.encode_prompts([prompt]), [("x",)]).x0
    return Drawn(np.asarray(to_images(policy.decode(latents))[0]).astype(int), seen[0])


def strong_lora(config, model: str, folder) -> None:
    """An adapter that visibly does something."""
    entry = config.models[model]
    policy = load_policy(entry, Hub(hub_dir(config.scale)), name=model)
    policy.add_lora(entry.lora_rank, entry.lora_targets, seed=0)
    torch.manual_seed(1)
    for parameter in policy.lora_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    policy.save_lora(folder / "lora")


LORA_LINE = (r"(?m)^pipe\.load_lora_weights\(.results/smoke/preference.*$", "pass")
WRONG_CODE = {  # changes of the card after which something else is drawn
    "sdxl_dmd2": [
        LORA_LINE,
        (r"(?m)^pipe\.unet\.load_state_dict.*$", "pass"),
        (r"(?m)^pipe\.scheduler = .*$", "pass"),
        (r"timesteps=\[999, 749, 499, 249\]", "num_inference_steps=2"),
    ],
    "sdxl_turbo": [
        LORA_LINE,
        ("EulerAncestralDiscreteScheduler", "LCMScheduler"),
        ("trailing", "leading"),
        ("guidance_scale=0.0", "guidance_scale=7.0"),
    ],
    "sdxl_lcm": [LORA_LINE, ("guidance_scale=3.0", "guidance_scale=50.0"), ('"unet": unet, ', "")],
    "sdxl_dpo_dmd2_lora": [LORA_LINE, (r"(?m)^pipe\.fuse_lora.*$", "pass"), (r"300\.0", "1.0")],
    "sdxl_turbo_dpo_delta": [LORA_LINE, (r"(?m)^ +value \+=.*$", "        pass")],
}


def pictures(smoke, folder, model: str, monkeypatch) -> tuple[Drawn, Drawn, dict[str, Drawn]]:
    """Of the card's code, of our sampler, and of the card's code with one change."""
    config = load({"scale": "smoke", "models": COMPOSED})
    (folder / "results/smoke").mkdir(parents=True)
    (folder / "results/smoke/hub").symlink_to(smoke / "results/smoke/hub", target_is_directory=True)
    monkeypatch.chdir(folder)
    run = dataclasses.replace(RUN, model=model)
    strong_lora(config, model, write_run(config, folder / "results", run, lora=False))
    write_tables(config, folder / "results")
    text = text_of(config, run, folder / "results")
    card_file(folder_of(config, folder / "results", run)).write_text(text)  # the folder as it is published
    theirs = drawn_by_the_card(text, folder, monkeypatch)
    wrong = {}
    for pattern, instead in WRONG_CODE[model]:
        changed = re.sub(pattern, instead, text)
        assert changed != text, pattern
        wrong[pattern] = drawn_by_the_card(changed, folder, monkeypatch)
    lora = folder_of(config, folder / "results", run) / "lora" / LORA_FILE
    return theirs, drawn_by_us(config, model, lora, card_module.PROMPTS[True], monkeypatch), wrong


@pytest.mark.parametrize("model", list(WRONG_CODE))
def test_the_cards_code_draws_our_picture_in_plain_diffusers(smoke, tmp_path, monkeypatch, model):
    theirs, ours, wrong = pictures(smoke, tmp_path, model, monkeypatch)
    assert np.abs(ours.picture - theirs.picture).max() <= 1
    assert theirs.apart(ours) < 1e-5
    for change, other in wrong.items():
        assert other.apart(ours) > 1e-3, change


def test_the_helpers_tables_have_no_two_equal_cells(paper):
    table = paper.table_entries["table1"]
    cells = {cards.value(p, line) for p in range(4) for line in range(2 * len(table.all_rows))}
    assert len(cells) > 60
