"""Every baseline, and a user's own method, from an entry to the table: the DAG at smoke scale."""

import json
import os
import shutil

import pandas as pd
import pytest
import torch
from conftest import snakemake
from safetensors.torch import load_file

from pso.config import load
from pso.runs import metric_missing

BASELINES = [
    *(f"{name}_{form}" for name in ("dpo", "rpo", "mapo", "spo") for form in ("transplant", "adapted")),
    "sft",
]
OWN = '''
"""Offline-PSO without a sigmoid: a method of the user's own, outside this repository."""
from pso.entries import EvidenceConfig

SOURCE, NEEDS_PRE = "my_lab.my_source:Pairs", True


class Config(EvidenceConfig):
    slope: float
    timestep_mode: str = "trajectory_sum"


def loss(target, reference, batch, cfg):
    return -cfg.slope * (target.ratio - reference.ratio).mean(), {}
'''
OWN_SOURCE = '''
from pso.sources import PreferencePairs


class Pairs(PreferencePairs):
    """The source of Offline-PSO under another name."""
'''


def row(model: str, method: str) -> dict:
    return {"label": f"{method} on {model}", "model": model, "method": method, "steps": 4}


ADDED = {"table1": [row("sdxl_dmd2", "mine")], "table2": [row("sdxl_turbo", "published_turbo_dpo")]}


@pytest.fixture(scope="module")
def made(smoke, tmp_path_factory):
    """A copy of the smoke run, made again with a row more for the user's method and for one that no table shows."""
    folder = shutil.copytree(smoke, tmp_path_factory.mktemp("baselines") / "run")
    (folder / "my_lab").mkdir()
    for name, text in {"__init__": "", "my_method": OWN, "my_source": OWN_SOURCE}.items():
        (folder / "my_lab" / f"{name}.py").write_text(text)
    tune = {"num_updates": 3, "batch_size": 4, "learning_rate": 2.0e-4, "probe_every": 3, "probe_prompts": 2}
    entry = {"title": "Mine", "module": "my_lab.my_method", "data": "pickapic_v2", "tune": tune}
    shipped = load({"scale": "smoke"}).table_entries
    settings = {
        "methods": {"mine": {**entry, "objective": {"slope": 2.0}}},
        "tables": {
            name: {"extra_rows": [*(r.model_dump() for r in shipped[name].extra_rows), *rows]}
            for name, rows in ADDED.items()
        },
    }
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = snakemake(*ADDED, cwd=folder, settings=settings, PYTHONPATH=paths)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def shown(folder, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / "results/smoke/tables" / f"{name}.csv").set_index(["label", "eval_set"])


@pytest.mark.parametrize("name", ADDED)
def test_a_method_is_trained_scored_and_in_the_table(made, name):
    (added,) = ADDED[name]
    run = made / "results/smoke/preference" / added["model"] / added["method"] / "seed0/run.json"
    steps = json.loads(run.read_text())["steps"]
    assert steps["done"] == steps["planned"] == (3 if added["method"] == "mine" else 6)
    scores = shown(made, name).loc[added["label"], ["pick_score", "clip_score", "sharpness"]]
    assert len(scores) == 2 and scores.notna().all(axis=None)


def test_the_rows_that_were_there_were_not_trained_again(smoke, made):
    runs = sorted((smoke / "results/smoke").glob("**/pytorch_lora_weights.safetensors"))
    runs = [lora for lora in runs if "/hub/" not in str(lora)]
    assert len(runs) > 20
    for lora in runs:
        assert (made / lora.relative_to(smoke)).stat().st_mtime == lora.stat().st_mtime


@pytest.mark.parametrize("name", ["table1", "table2", "table4"])
def test_every_row_is_measured(smoke, name):
    config = load({"scale": "smoke"})
    table, entry = shown(smoke, name), config.table_entries[name]
    assert list(table.index.unique("label")) == [row.label for row in entry.all_rows]
    columns = [*entry.metrics, *entry.extra_metrics]
    measured = [metric for metric in columns if metric_missing(config, entry, metric) is None]
    assert set(columns) - set(measured) == {"diversity"}, "at this scale a prompt has one picture"
    assert table[measured].notna().all(axis=None) and table["diversity"].isna().all() and len(measured) >= 8


@pytest.mark.parametrize("model", ["sdxl_dmd2", "sdxl_turbo", "sdxl_lcm"])
def test_every_baseline_is_in_a_table_for_every_distilled_model(model):
    tables = load().table_entries
    default = {(r.model, r.method) for name in ("table1", "table2", "table4") for r in tables[name].all_rows}
    more = default | {(r.model, r.method) for r in tables["extended"].all_rows}
    for name in ("dpo", "rpo", "mapo", "spo"):
        assert (model, f"{name}_adapted") in default and (model, f"{name}_transplant") in more
    assert {(model, m) for m in ("diffusion", "pso_offline", "pso_online")} <= default
    assert {(model, f"{m}_equal_forwards") for m in ("diffusion", "dpo", "rpo", "mapo")} <= more


def test_what_others_published_is_a_run_of_ours_in_the_weights(smoke):
    """The stand-in of SDXL-DPO is the teacher with the run's LoRA, by PEFT's own formula; SPO's is the LoRA itself."""
    hub = smoke / "results/smoke/hub"
    runs = smoke / "results/smoke/published"
    folder = runs / "sdxl/dpo_transplant/seed0/lora/pytorch_lora_weights.safetensors"
    lora = load_file(folder)
    teacher, dpo = (
        load_file(hub / repo / "unet/diffusion_pytorch_model.safetensors")
        for repo in ("stabilityai/stable-diffusion-xl-base-1.0", "mhdang/dpo-sdxl-text2image-v1")
    )
    moved = 0
    for key, value in teacher.items():
        name = f"unet.{key.removesuffix('.weight')}"
        if f"{name}.lora_A.weight" in lora and value.ndim == 2:  # alpha = rank: B A is added as it is
            value = value + lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
            moved += not torch.equal(value, teacher[key])
            torch.testing.assert_close(dpo[key], value, rtol=1e-4, atol=1e-6)
        elif f"{name}.lora_A.weight" not in lora:
            assert torch.equal(dpo[key], value)
    assert moved > 10
    spo = hub / "SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep_LoRA/spo_sdxl_10ep_4k-data_lora_diffusers.safetensors"
    assert spo.read_bytes() == (runs / "sdxl_stochastic/spo/seed0/lora/pytorch_lora_weights.safetensors").read_bytes()


def test_every_baseline_has_both_forms_at_every_scale():
    for scale in ("smoke", "miniature"):
        assert set(BASELINES) <= set(load({"scale": scale}).methods)
