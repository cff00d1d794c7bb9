"""Every baseline, and a user's own method, from an entry to the table: the DAG at smoke scale."""

import json
import os
import shutil

import pandas as pd
import pytest
from conftest import snakemake

from pso.config import load

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


def row(method: str) -> dict:
    return {"label": f"{method} w/ SDXL-DMD2", "model": "sdxl_dmd2", "method": method, "steps": 4}


@pytest.fixture(scope="module")
def made(smoke, tmp_path_factory):
    """A copy of the smoke run, made again with one row more for each baseline and for the user's method."""
    folder = shutil.copytree(smoke, tmp_path_factory.mktemp("baselines") / "run")
    (folder / "my_lab").mkdir()
    for name, text in {"__init__": "", "my_method": OWN, "my_source": OWN_SOURCE}.items():
        (folder / "my_lab" / f"{name}.py").write_text(text)
    tune = {"num_updates": 3, "batch_size": 4, "learning_rate": 2.0e-4, "probe_every": 3, "probe_prompts": 2}
    entry = {"title": "Mine", "module": "my_lab.my_method", "data": "pickapic_v2", "tune": tune}
    shipped = [r.model_dump() for r in load({"scale": "smoke"}).table_entries["table1"].extra_rows]
    settings = {
        "methods": {"mine": {**entry, "objective": {"slope": 2.0}}},
        "tables": {"table1": {"extra_rows": [*shipped, *(row(method) for method in [*BASELINES, "mine"])]}},
    }
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = snakemake("table1", cwd=folder, settings=settings, PYTHONPATH=paths)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("method", [*BASELINES, "mine"])
def test_a_method_is_trained_scored_and_in_the_table(made, method):
    base = made / "results" / "smoke"
    run = json.loads((base / f"preference/sdxl_dmd2/{method}/seed0/run.json").read_text())
    assert run["steps"]["done"] == run["steps"]["planned"] == (3 if method == "mine" else 6)
    table = pd.read_csv(base / "tables" / "table1.csv").set_index(["eval_set", "label"])
    scores = table.loc[(slice(None), row(method)["label"]), ["pick_score", "clip_score", "sharpness"]]
    assert len(scores) == 2 and scores.notna().all(axis=None)


def test_the_rows_that_were_there_were_not_trained_again(smoke, made):
    for method in ("pso_offline", "pso_online"):
        lora = f"results/smoke/preference/sdxl_dmd2/{method}/seed0/lora/pytorch_lora_weights.safetensors"
        assert (made / lora).stat().st_mtime == (smoke / lora).stat().st_mtime


def test_every_baseline_has_both_forms_at_every_scale():
    for scale in ("smoke", "miniature"):
        assert set(BASELINES) <= set(load({"scale": scale}).methods)
