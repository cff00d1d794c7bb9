"""Runs through the command line: kill and resume, the record, bad input; and a method's parts."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
import yaml
from conftest import ROOT, run, smoke_settings
from hubs import last_line, own, share
from safetensors.torch import load_file, save_file

from pso import provenance, pso_offline
from pso.config import ConfigError, load
from pso.entries import EvidenceConfig
from pso.hub import Hub
from pso.mdp import Renoise
from pso.objective import Objective
from pso.paths import LORA_FILE
from pso.provenance import sha256_of
from pso.sources import PreferencePairs
from pso.tune import Run, code_of, method_of, tuned_model

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
# kill -9 from inside at update 5, in the middle of a line of the log
KILLED = """
import os, signal
from pso.journal import Journal
update = Journal.update
def update_and_die(self, done, values):
    update(self, done, values)
    if done == 5:
        with open(self.path, "a") as file:
            file.write('{"event": "upd')
        os.kill(os.getpid(), signal.SIGKILL)
Journal.update = update_and_die
import pso.tune
pso.tune.main()
"""


def task_of(method: str) -> str:
    return "concept/cored_circle" if method == "pso" else "preference"  # general PSO is for a subject


def tune(results: Path, method: str, *, program=("-m", "pso.tune"), settings: str | None = None, **environment):
    chosen = ("--task", task_of(method), "--model", "sdxl_dmd2", "--method", method, "--results", str(results))
    return run("python", *program, *chosen, "--set", settings or smoke_settings(), **environment)


def folder(results: Path, method: str) -> Path:
    return results / "smoke" / task_of(method) / "sdxl_dmd2" / method / "seed0"


@pytest.mark.parametrize("method", ["pso_offline", "pso_online", "pso", "diffusion", "spo_transplant"])
def test_kill_and_resume_gives_the_same_lora_bit_for_bit(method, with_hub, smoke, tmp_path_factory):
    assert tune(with_hub, method, program=("-c", KILLED)).returncode == -9
    state, log = (folder(with_hub, method) / name for name in ("state", "train.jsonl"))
    assert [p.name for p in state.iterdir()] == ["update0000003"]  # checkpoint_every is 3
    assert '"update": 5' in log.read_text() and log.read_text().endswith('{"event": "upd')
    progress = state / "update0000003" / "progress.json"
    content = json.loads(progress.read_text())
    progress.write_text(json.dumps(content | {"cost": content["cost"] | {"wall_s": 1000.0, "cpu_s": 900.0}}))
    resumed = tune(with_hub, method)
    assert resumed.returncode == 0, resumed.stderr
    assert [p.name for p in folder(with_hub, method).iterdir() if "state" in p.name] == [".state.done"]

    whole = share(smoke, tmp_path_factory.mktemp("whole"))
    assert tune(whole, method).returncode == 0
    ours, theirs = (load_file(folder(r, method) / "lora" / LORA_FILE) for r in (with_hub, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert any(ours[k].abs().max() > 0 for k in ours if "lora_B" in k)

    logs = [(folder(r, method) / "train.jsonl").read_text().splitlines() for r in (with_hub, whole)]
    assert logs[0] == logs[1]
    entries = [json.loads(line) for line in logs[0]]
    assert [e["update"] for e in entries if e["event"] == "update"] == [1, 2, 3, 4, 5, 6]
    records = [json.loads((folder(r, method) / "run.json").read_text()) for r in (with_hub, whole)]
    assert [r["resumed_at"] for r in records] == [[3], []]
    costs = [r["cost"] for r in records]
    assert costs[0]["unet_forwards"] == costs[1]["unet_forwards"]
    assert costs[0].get("reward_queries") == costs[1].get("reward_queries")
    assert costs[0]["wall_s"] >= 1000 and costs[0]["cpu_s"] >= 900


@pytest.fixture(scope="module")
def killed(smoke, tmp_path_factory):
    """Results of a run that was killed after its first checkpoint."""
    results = share(smoke, tmp_path_factory.mktemp("killed"))
    assert tune(results, "pso_offline", program=("-c", KILLED)).returncode == -9
    return results


def other_settings(results: Path) -> dict:
    return {"settings": smoke_settings(methods={"pso_offline": {"tune": {"learning_rate": 1.0e-3}}})}


def other_weights(results: Path) -> dict:
    path = own(results, "hub") / "tianweiy/DMD2/dmd2_sdxl_4step_unet_fp16.bin"
    state = torch.load(path, weights_only=True)
    torch.save({k: v + 1e-3 for k, v in state.items()}, path)
    return {}


def other_data(results: Path) -> dict:
    path = own(results, "cache") / "sdxl_dmd2" / "pickapic_v2.safetensors"
    save_file({k: v + 1 if k == "prompt_index" else v for k, v in load_file(path).items()}, path)
    about = path.with_suffix(".json")
    about.write_text(json.dumps(json.loads(about.read_text()) | {"sha256": sha256_of(path)}))
    return {}


def other_code(results: Path) -> dict:
    for name in ("pso", "baselines", "eval", "workflow"):
        shutil.copytree(ROOT / name, results / "code" / name)
    with open(results / "code" / "pso" / "pso_offline.py", "a") as file:
        file.write("\nA = 1\n")
    return {"cwd": results / "code", "PYTHONPATH": str(results / "code")}


OTHERS = {"settings": other_settings, "weights and data": other_weights, "code": other_code}


@pytest.mark.parametrize(("name", "change"), [*OTHERS.items(), ("weights and data", other_data)])
def test_a_state_made_from_something_else_is_refused(killed, tmp_path, name, change):
    results = shutil.copytree(killed, tmp_path / "results", symlinks=True)
    line = last_line(tune(results, "pso_offline", **change(results)))
    state = folder(results, "pso_offline") / "state"
    assert f"was written with other {name}; remove {state} to start this run anew" in line


def test_the_journal_starts_at_log_two_and_probes_the_sampler(smoke):
    lines = (folder(smoke / "results", "pso_offline") / "train.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    first = next(e for e in entries if e["event"] == "update")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["margin"] == 0
    probes = [e for e in entries if e["event"] == "probe"]
    assert [p["update"] for p in probes] == [0, 3, 6]
    assert set(probes[0]["kl"]) == {"4", "3", "2"} and set(probes[0]["kl"].values()) == {0.0}
    assert all(v > 0 for v in probes[-1]["kl"].values()) and np.isfinite(probes[-1]["reward"])


def test_progress_line_tells_the_time_left(smoke):
    log = (folder(smoke / "results", "pso_online") / "tune.log").read_text()
    assert re.search(r"update 6/6  loss [\d.]+ .* left 0:00", log)


# ---- the record ----


def record_of(smoke: Path, method: str) -> dict:
    return json.loads((folder(smoke / "results", method) / "run.json").read_text())


def test_the_record_holds_every_setting_with_its_default(smoke):
    for method, data in (("pso_offline", "pickapic_v2"), ("pso_online", "training_prompts_4k")):
        config = record_of(smoke, method)["config"]
        assert yaml.safe_load((folder(smoke / "results", method) / "config.yaml").read_text()).keys() == config.keys()
        assert config["method"][method]["objective"]["omega"] == "one"  # stands in no file
        assert config["dataset"] == {data: json.loads(load({"scale": "smoke"}).datasets[data].model_dump_json())}
        assert config["metrics"]["pick_score"]["checkpoint"]["repo"] == "yuvalkirstain/PickScore_v1"


def test_the_record_holds_what_was_trained_on_and_how(smoke):
    record = record_of(smoke, "pso_offline")
    inputs = {entry.get("repo", "") + "/" + entry["file"]: entry["sha256"] for entry in record["inputs"]}
    assert len(inputs) == len(record["inputs"])
    base = smoke / "results" / "smoke"
    cache, shard = (
        "cache/sdxl_dmd2/pickapic_v2.safetensors",
        "yuvalkirstain/pickapic_v2/data/train-00001-of-00002.parquet",
    )
    assert inputs["/" + cache] == sha256_of(base / cache)
    assert inputs[shard] == sha256_of(base / "hub" / shard)
    assert {"dtype": "float32", "attention": ["AttnProcessor2_0"]}.items() <= record["numerics"].items()
    assert record["numerics"]["allow_tf32"]["matmul"] is False


def test_the_fingerprint_of_a_run_sees_its_method_reward_and_source(monkeypatch, tmp_path):
    config = load({"scale": "smoke"})
    a_run = Run(config, "preference", "sdxl_dmd2", "diffusion", 0, tmp_path, tmp_path)
    for name in ("pso", "baselines", "eval"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    seen = [code_of(a_run, Source())]
    for file in ("baselines/diffusion.py", "eval/metrics/pick_score.py", "pso/mdp.py", "pso/lab.py"):
        with open(tmp_path / file, "a") as handle:
            handle.write("\nA = 1\n")
        seen.append(code_of(a_run, Source()))
    (tmp_path / "pso/pso.py").write_text("A = 1\n")  # another method
    assert len(set(seen)) == 5 and code_of(a_run, Source()) == seen[-1]


class Source:
    __module__ = "pso.lab"


def test_the_tuned_lora_of_a_run_has_diffusers_keys(smoke):
    state = load_file(folder(smoke / "results", "pso_offline") / "lora" / LORA_FILE)
    assert all(k.startswith("unet.") and (".lora_A." in k or ".lora_B." in k) for k in state)


# ---- bad input: one sentence, a non-zero exit, nothing half-written ----


def test_missing_weights_file(with_hub, smoke):
    (with_hub / "smoke" / "hub").unlink()
    (with_hub / "smoke" / "hub").mkdir()
    line = last_line(tune(with_hub, "pso_offline"))
    assert "stabilityai/stable-diffusion-xl-base-1.0 is not in the hub" in line and "`snakemake hub` makes it" in line
    assert not (folder(with_hub, "pso_offline") / "lora").exists()


def test_weights_of_another_model(with_hub, smoke):
    source = smoke / "results" / "smoke" / "hub"
    (with_hub / "smoke" / "hub").unlink()
    target = with_hub / "smoke" / "hub"
    target.mkdir()
    for path in source.iterdir():
        if path.name != "tianweiy":
            (target / path.name).symlink_to(path)
    (target / "tianweiy" / "DMD2").mkdir(parents=True)
    torch.save({"conv_in.weight": torch.zeros(1)}, target / "tianweiy" / "DMD2" / "dmd2_sdxl_4step_unet_fp16.bin")
    line = last_line(tune(with_hub, "pso_offline"))
    assert "is not a state dict of the base's UNet" in line and "fetch it again" in line


def test_a_lost_weights_file_ends_the_command_with_a_sentence(with_hub):
    (own(with_hub, "hub") / BASE / "text_encoder/model.safetensors").unlink()
    line = last_line(tune(with_hub, "pso_offline"))
    assert line.startswith(f"tune: {BASE} in the hub ") and "model.safetensors" in line


# ---- bad settings ----


def test_unknown_method(with_hub):
    line = last_line(tune(with_hub, "pso_offlin", settings=smoke_settings()))
    assert line.startswith("tune: --method is 'pso_offlin'; expected one of") and "pso_offline" in line
    assert not folder(with_hub, "pso_offlin").exists()


def test_a_learning_rate_that_blows_up_stops_with_advice_that_works(with_hub):
    tuning = {"learning_rate": 1.0e30, "checkpoint_every": 1}
    line = last_line(tune(with_hub, "diffusion", settings=smoke_settings(methods={"diffusion": {"tune": tuning}})))
    assert "gradient norm" in line and not (folder(with_hub, "diffusion") / "run.json").exists()
    state, lower = re.search(r"remove (\S+), lower (\S+) and run the same command again", line).groups()
    assert lower == "methods.diffusion.tune.learning_rate" and list(Path(state).iterdir())
    settings = smoke_settings(methods={"diffusion": {"tune": tuning | {"learning_rate": 1.0e-4}}})
    assert "was written with other settings" in last_line(tune(with_hub, "diffusion", settings=settings))
    shutil.rmtree(state)
    done = tune(with_hub, "diffusion", settings=settings)
    assert done.returncode == 0, done.stderr


def smoke_run(folder: Path, model: dict | None = None, method: dict | None = None) -> Run:
    """A run of pso_offline with changes of its entries."""
    changes = smoke_settings(models={"sdxl_dmd2": model or {}}, methods={"pso_offline": method or {}})
    return Run(load(json.loads(changes)), "preference", "sdxl_dmd2", "pso_offline", 0, folder, folder)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"lora_targets": ["to_qq"]}, "models.sdxl_dmd2.lora_targets is ['to_qq']; expected names of linear layers"),
        ({"lora_targets": ["to_q", "to_vv"]}, "(it has no layer to_vv)"),
        ({"lora_targets": ["norm1"]}, "models.sdxl_dmd2.lora_targets is ['norm1']; expected names of linear layers"),
    ],
)
def test_a_model_that_cannot_be_tuned_is_one_sentence(smoke, tmp_path, model, said):
    with pytest.raises(ConfigError) as caught:
        tuned_model(smoke_run(tmp_path, model), Hub(smoke / "results/smoke/hub"), "cpu")
    assert said in str(caught.value) and "\n" not in str(caught.value)


METHOD = """
from pso.pso_offline import Config, NEEDS_PRE, loss
SOURCE = "{}"
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A laboratory's own modules: a source, and methods that name one."""
    (tmp_path / "my_lab").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_lab" / "sources.py").write_text("class MySource:\n    pass\n")

    def method_with(source: str):
        name = f"method{len(list((tmp_path / 'my_lab').iterdir()))}"
        (tmp_path / "my_lab" / f"{name}.py").write_text(METHOD.format(source))
        return smoke_run(tmp_path, method={"module": f"my_lab.{name}"})

    yield method_with
    for name in [name for name in sys.modules if name.split(".")[0] == "my_lab"]:
        del sys.modules[name]


def test_a_source_is_one_of_ours_or_a_dotted_path(lab):
    assert method_of(lab("PreferencePairs"))[2] is PreferencePairs
    assert method_of(lab("my_lab.sources:MySource"))[2].__module__ == "my_lab.sources"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("PreferencePair", "but pso.sources has no 'PreferencePair'"),
        ("my_lab.sources:Other", "but my_lab.sources has no 'Other'"),
        ("my_lab.nothing:Other", "but there is no module 'my_lab.nothing'"),
    ],
)
def test_a_source_that_does_not_exist_is_one_sentence(lab, source, said):
    with pytest.raises(ConfigError) as caught:
        method_of(lab(source))
    assert "SOURCE in my_lab.method" in str(caught.value) and said in str(caught.value)


def test_a_module_that_is_no_method_is_one_sentence(tmp_path):
    with pytest.raises(
        ConfigError, match="methods.pso_offline.module is 'json', which has no Config; expected Config, "
    ):
        method_of(smoke_run(tmp_path, method={"module": "json"}))


# ---- a loss that uses one side only ----


@pytest.mark.parametrize("side", ["target", "reference"])
def test_a_loss_of_one_side_has_the_same_gradient_in_two_passes(side):
    def loss(target, reference, batch, cfg):
        return ({"target": target, "reference": reference}[side].ratio ** 2).sum(), {}

    method, found = SimpleNamespace(loss=loss, NEEDS_PRE=True), []
    for micro_batch in (100, 4):
        policy = toy.new_policy(moved=0.2)
        step = Objective(method, EvidenceConfig(), policy, Renoise(toy.TIMES), micro_batch)
        step.backward(toy.new_batch(pso_offline, step.chain), policy.encode_prompts(toy.PROMPTS))
        found.append(torch.cat([p.grad.flatten() for p in policy.lora_parameters()]))
    assert found[0].norm() > 0 and (found[0] - found[1]).norm() < 1e-4 * found[0].norm()
