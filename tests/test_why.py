"""Which key made a run stale: synthetic records, and a real tiny run with one key changed."""

import json
import os
from pathlib import Path

import pytest
from test_estimate import UPDATES, ran, settings
from toy import TIMES

from pso import provenance, why
from pso.config import load
from pso.entries import told_folder
from pso.mdp import Renoise
from pso.params import kept_params, model_params, pair_params, run_modules, run_params
from pso.provenance import UserError, fingerprints, sha256_of, versions

METHOD, MODEL = "pso_offline", "sdxl_dmd2"
ABOUT = {"scale": "paper", "model": {MODEL: {}}, "method": {METHOD: {}}}


def record(config) -> dict:
    """What a run made now with this config keeps."""
    params = json.loads(json.dumps(kept_params(config, MODEL, METHOD)))
    return {"job": "tune", "config": ABOUT, "params": params, "modules": fingerprints(*run_modules(config, METHOD)),
            "inputs": [], "versions": versions()}  # fmt: skip


@pytest.fixture
def made(tmp_path):
    """write(record, files) makes a run's folder and the scale's files; its text against a config."""

    def write(content: dict, files: dict[str, str] | None = None) -> Path:
        folder = tmp_path / "paper/preference" / MODEL / METHOD / "seed0"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (files or {}).items():
            (tmp_path / "paper" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "paper" / name).write_text(text)
        (folder / "run.json").write_text(json.dumps(content))
        return folder

    return write


def said(config, folder: Path) -> list[str]:
    """The lines of the list."""
    text = why.text(config, folder, folder.parents[4])
    return [line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")]


PAPER = load({"scale": "paper"})


def test_nothing_changed_says_so(made):
    folder = made(record(PAPER))
    assert why.text(PAPER, folder) == "**sdxl_dmd2 pso_offline, scale paper**: nothing changed.\n"
    assert why.text(PAPER, folder / "run.json") == why.text(PAPER, folder)


CHANGES = [
    ({"methods": {METHOD: {"tune": {"learning_rate": 2.0e-5}}}}, "`method.tune.learning_rate: 1e-05 -> 2e-05`"),
    ({"methods": {METHOD: {"objective": {"omega": "kl"}}}}, '`method.objective.omega: "one" -> "kl"`'),
    ({"methods": {METHOD: {"tune": {"probe_reward": None}}}}, None),
    ({"models": {MODEL: {"lora_rank": 8}}}, "`model.lora_rank: 16 -> 8`"),
    ({"models": {MODEL: {"grids": {4: [999, 749, 500, 249]}}}},
     "`model.grids.4: [999, 749, 499, 249] -> [999, 749, 500, 249]`"),
    ({"scales": {"paper": {"dtype": "float32"}}}, '`dtype: "bfloat16" -> "float32"`'),
    ({"datasets": {"pickapic_v2": {"files": "x"}}}, '`method.data.files: "data/train-*.parquet" -> "x"`'),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line"), CHANGES)
def test_a_changed_key_is_named_with_both_values(made, change, line):
    found = said(load({"scale": "paper"} | change), made(record(PAPER)))
    if line is not None:
        assert found == [line]
        return
    assert found[0] == '`method.tune.probe_reward: "pick_score" -> null`'
    assert {part.partition(":")[0] for part in found[1:]} == {"`rewards.pick_score`", "`eval.metrics.pick_score`"} | {
        part.partition(":")[0] for part in found if part.endswith("no longer used")
    }


@pytest.mark.parametrize(
    "change",
    [
        {"methods": {METHOD: {"title": "x", "tune": {"checkpoint_every": 7}}}},
        {"models": {MODEL: {"title": "x", "grids": {3: [999, 666, 333]}}}},
        {"metrics": {"pick_score": {"decimals": 5}}, "tables": {"table1": {"caption": "x"}}},
    ],
)
def test_what_changes_no_number_is_no_change(made, change):
    assert said(load({"scale": "paper"} | change), made(record(PAPER))) == []


def test_added_and_removed_keys(made):
    content = record(PAPER)
    content["params"]["method"]["tune"] |= {"old_key": 3}
    del content["params"]["method"]["objective"]["beta"]
    found = said(PAPER, made(content))
    assert found == ["`method.tune.old_key`: removed, was 3", "`method.objective.beta`: added, 50.0"]


def test_a_method_that_is_no_more(made):
    content = record(PAPER) | {"config": ABOUT | {"method": {"pso_gone": {}}}}
    assert said(PAPER, made(content)) == ["`methods.pso_gone`: removed"]


def test_changed_code_is_named_by_module(made):
    content = record(PAPER)
    content["modules"] |= {"pso.mdp": "0" * 16, "pso.forgotten": "1" * 16}
    del content["modules"]["pso.rollout"]
    folder = made(content)
    assert said(PAPER, folder) == [
        "`pso.forgotten`: no longer used",
        "`pso.mdp`: its code changed",
        "`pso.rollout`: newly used",
    ]
    assert "3 changes since it was made: it is stale" in why.text(PAPER, folder)


def test_inputs_are_looked_at(made):
    files = {"hub/owner/name/a.bin": "a", "hub/owner/name/b.bin": "b", "cache/m/d.safetensors": "c"}
    inputs = [{"repo": "owner/name", "file": f"{n}.bin", "sha256": "0" * 64} for n in "abz"]
    inputs += [{"file": "cache/m/d.safetensors", "sha256": "0" * 64}]
    folder = made(record(PAPER), files)
    inputs[0]["sha256"] = sha256_of(folder.parents[3] / "hub/owner/name/a.bin")
    made(record(PAPER) | {"inputs": inputs})
    new = {name: sha256_of(folder.parents[3] / name)[:12] for name in files}
    assert said(PAPER, folder) == [
        f"`owner/name: b.bin`: sha256 {'0' * 12} -> {new['hub/owner/name/b.bin']}",
        "`owner/name: z.bin`: missing",
        f"`cache/m/d.safetensors`: sha256 {'0' * 12} -> {new['cache/m/d.safetensors']}",
    ]


def test_a_fetched_file_is_not_read_again(made):
    """335 GB of pairs are among a run's inputs."""
    step = {"job": "fetch", "revision": "0" * 40, "files": [{"file": "a.bin", "size": 1, "sha256": "checked then"}]}
    folder = made(record(PAPER), {"hub/owner/name/a.bin": "a", "hub/repositories/owner--name.json": json.dumps(step)})
    place = folder.parents[3] / "hub/owner/name/a.bin"
    os.utime(place, ns=(0, 0))
    told = {"repo": "owner/name", "file": "a.bin", "sha256": "checked then"}
    assert said(PAPER, made(record(PAPER) | {"inputs": [told]})) == []
    place.write_text("b")  # of the same size, later
    assert len(said(PAPER, folder)) == 1


def test_a_cache_that_has_only_grown_is_no_change(made):
    files = {"cache/m/d.safetensors": "with one more seed", "cache/m/d.json": json.dumps({"made_from": "same"})}
    told = {"file": "cache/m/d.safetensors", "sha256": "0" * 64}
    assert said(PAPER, made(record(PAPER) | {"inputs": [told | {"made_from": "same"}]}, files)) == []
    for other in (told, told | {"made_from": None}, told | {"made_from": "other"}):
        assert len(said(PAPER, made(record(PAPER) | {"inputs": [other]}))) == 1


def test_a_folder_of_the_users_own_is_found_by_the_config_and_never_named_in_the_record(made, tmp_path):
    own = tmp_path / "mine"
    own.mkdir()
    (own / "metadata.jsonl").write_text("x")
    config = load({"scale": "paper", "datasets": {"style_pictures": {"repo": str(own), "files": "."}}})
    assert str(tmp_path) not in json.dumps(kept_params(config, "sdxl_turbo", "pso_offline_style"))
    inputs = [{"repo": "mine", "file": "metadata.jsonl", "sha256": "0" * 64},
              {"repo": "mine", "file": ".: 3 pictures", "sha256": "0" * 64}]  # fmt: skip
    found = said(config, made(record(PAPER) | {"inputs": inputs}))
    assert found[0].startswith("`mine: metadata.jsonl`: sha256 000000000000 -> ")
    assert found[1] == "`mine: .: 3 pictures`, kept by a digest of all together"


def with_unet(folder: Path, content: str):
    """A configuration whose model has its UNet from a folder with one file."""
    folder.mkdir(parents=True)
    (folder / "w.bin").write_text(content)
    return load({"scale": "paper", "models": {MODEL: {"unet": {"repo": str(folder), "file": "w.bin"}}}})


def test_weights_of_the_users_own_are_kept_by_name_and_told_apart_by_path_and_files(made, tmp_path):
    one, other = (with_unet(tmp_path / name / "my_unet", name) for name in ("one", "other"))
    assert kept_params(one, MODEL, METHOD) == kept_params(other, MODEL, METHOD)
    assert kept_params(one, MODEL, METHOD)["model"]["unet"]["repo"] == "./my_unet"
    assert str(tmp_path) not in json.dumps(kept_params(one, MODEL, METHOD))
    assert run_params(one, MODEL, METHOD) != run_params(other, MODEL, METHOD)  # what Snakemake compares
    told = {"repo": "my_unet", "file": "w.bin", "sha256": sha256_of(tmp_path / "one/my_unet/w.bin")}
    folder = made(record(one) | {"inputs": [told]})
    assert said(one, folder) == []
    (line,) = said(other, folder)
    assert line.startswith(f"`my_unet: w.bin`: sha256 {told['sha256'][:12]} -> ")
    (tmp_path / "one/my_unet/w.bin").unlink()
    assert said(one, folder) == ["`my_unet: w.bin`: missing"]


def test_a_base_of_the_users_own_is_a_path_to_the_workflow_and_a_name_in_dumps(tmp_path):
    own = load({"scale": "paper", "models": {MODEL: {"base": "/" + "srv/me/base"}}})
    for found in (model_params(own, MODEL), pair_params(own, MODEL, "pickapic_v2")):
        assert found["base"] == "/" + "srv/me/base"
    assert own.models[MODEL].model_dump()["base"] == "./base"
    for name, entry in PAPER.models.items():  # nothing that is finished gets stale
        assert model_params(PAPER, name) == entry.model_dump(exclude={"title"})


@pytest.mark.parametrize(
    ("repo", "told"),
    [
        ("owner/name", "owner/name"),
        ("../above/my_unet/", "./my_unet"),
        ("./results/paper/style/m/pso/seed0/lora", "./results/paper/style/m/pso/seed0/lora"),
        ("./results/../secret/my_unet", "./my_unet"),
        ("/" + "srv/results/x", "./x"),
    ],
)
def test_a_folder_of_results_is_told_whole_and_every_other_by_its_name(repo, told):
    assert told_folder(repo) == told and told_folder(told) == told


def test_other_versions_are_told_and_are_no_reason(made):
    folder = made(record(PAPER) | {"versions": versions() | {"torch": "1.0"}})
    text = why.text(PAPER, folder)
    assert "nothing changed." in text and "no reason to run it again" in text
    assert f'`torch: "1.0" -> "{versions()["torch"]}"`' in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no run.json; expected a run's folder"),
        ("{", "is not JSON"),
        ("[]", "is not the record of a tuning run"),
        ('{"job": "generate"}', "is not the record of a tuning run"),
        ('{"job": "tune"}', "is of an earlier version of this project"),
        (json.dumps(record(PAPER) | {"config": ABOUT | {"scale": "smoke"}}), "is of the scale smoke"),
    ],
)
def test_what_is_no_run_is_one_sentence(tmp_path, content, said):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        why.text(PAPER, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_that_is_not_finished_is_told_from_no_run(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(UserError, match="not finished: it has a state/"):
        why.text(PAPER, tmp_path)


# ---- a real run ----


def test_a_real_run_is_stale_by_the_one_key_that_changed(tmp_path):
    content, _ = ran(tmp_path, METHOD, UPDATES, {}, 0.0, Renoise(TIMES))
    same, other = (load(settings(METHOD, UPDATES | more, {}, 0.0)) for more in ({}, {"learning_rate": 3.0e-5}))
    assert "nothing changed." in why.text(same, tmp_path, tmp_path)
    assert said_of(why.text(other, tmp_path, tmp_path)) == ["`method.tune.learning_rate: 1e-05 -> 3e-05`"]
    assert str(tmp_path) not in json.dumps(content) and content["modules"]["pso.pso_offline"]


def said_of(text: str) -> list[str]:
    return [line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")]


def test_a_real_run_is_stale_by_the_code_that_changed(tmp_path, monkeypatch):
    ran(tmp_path, METHOD, UPDATES, {}, 0.0, Renoise(TIMES))
    source = provenance._source
    edited = tmp_path / "evidence.py"
    edited.write_text(source("pso.evidence").read_text() + "\nA = 1\n")
    monkeypatch.setattr(provenance, "_source", lambda module: edited if module == "pso.evidence" else source(module))
    config = load(settings(METHOD, UPDATES, {}, 0.0))
    assert said_of(why.text(config, tmp_path, tmp_path)) == ["`pso.evidence`: its code changed"]
