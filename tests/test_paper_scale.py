"""The scales that take published files: what a dry run lists, which repositories it needs, and the budgets."""

import subprocess
import sys

import pytest

from pso.config import ConfigError, load
from pso.entries import UNTUNED
from pso.provenance import ROOT
from pso.runs import jobs
from pso.steps import Steps, needed, slug

PAPER = load({"scale": "paper"})


def planned(scale: str, target: str, folder) -> list[str]:
    """The jobs of a dry run, as `rule: wildcards`, in a folder without results."""
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "1", "-s", str(ROOT / "workflow" / "Snakefile")]
    done = subprocess.run(
        [*command, "--config", f"scale={scale}", "--", target], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    found, rule = [], None
    for line in done.stdout.splitlines():
        if line.startswith("rule ") and line.endswith(":"):
            rule = line.removeprefix("rule ").rstrip(":")
            found.append(rule)
        elif line.strip().startswith("wildcards:") and rule:
            found[-1] = f"{rule}: {line.split(':', 1)[1].strip()}"
    return found


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    return planned("paper", "all", tmp_path_factory.mktemp("paper"))


def test_a_dry_run_lists_every_run_of_the_four_tables_once(paper):
    runs = {(job.task, job.model, job.method, job.seed) for job in jobs(PAPER) if job.method != UNTUNED}
    listed = [line for line in paper if line.startswith("tune:")]
    expected = {f"tune: task={t}, model={m}, method={way}, seed={seed}" for t, m, way, seed in runs}
    assert len(listed) == len(set(listed)) and expected == set(listed)
    assert len([run for run in runs if run[0] == "concept/teapot"]) == 3  # of each of the 30 subjects
    assert PAPER.tables == ["table1", "table2", "table3", "table4"]


def test_every_image_of_every_model_is_made_and_scored_once(paper):
    pairs = {(job.task.partition("/")[0], job.model) for job in jobs(PAPER)}
    for rule in ("generate", "score"):
        assert {line for line in paper if line.startswith(f"{rule}:")} == {
            f"{rule}: task={t}, model={m}" for t, m in pairs
        }


def test_texts_are_encoded_once_for_each_base_and_not_for_each_model(paper):
    bases = {PAPER.models[job.model].base for job in jobs(PAPER)}
    assert {line for line in paper if line.startswith("texts:")} == {f"texts: base={slug(base)}" for base in bases}
    assert len(bases) == 2 < len({job.model for job in jobs(PAPER)})


def test_every_repository_that_is_needed_is_fetched_and_no_other(paper):
    assert {line for line in paper if line.startswith("fetch:")} == {
        f"fetch: slug={slug(repo)}" for repo in needed(PAPER)
    }
    assert not [line for line in paper if line.startswith("hub_")]  # nothing of the stand-in world
    assert "pso-bench/style-world" not in needed(PAPER)


def test_each_job_waits_for_what_it_loads():
    steps = Steps(PAPER)
    dmd2 = steps.model("sdxl_dmd2")
    assert [path.rpartition("/")[2] for path in dmd2] == [
        "madebyollin--sdxl-vae-fp16-fix.json",
        "stabilityai--stable-diffusion-xl-base-1.0.json",
        "tianweiy--DMD2.json",
    ]
    assert any("mhdang--dpo-sdxl" in path for path in steps.model("sdxl_turbo_dpo_delta"))
    assert any("laion--CLIP-ViT-H-14" in path for path in steps.scorers("pick_score"))  # its tokenizer
    assert steps.gate("sdxl_dmd2") == []
    assert not any("Step-Aware" in path for path in steps.rewards("spo_adapted", "sdxl_dmd2"))  # trained here
    assert any("Step-Aware" in path for path in steps.rewards("spo_transplant", "sdxl_dmd2"))


def test_the_reduced_budget_is_a_share_of_the_updates_and_of_nothing_else():
    reduced = load({"scale": "reduced"})
    share = reduced.scale_entry.budget
    assert 0 < share < 1
    for name, method in reduced.methods.items():
        full = PAPER.methods[name]
        assert method.tune.num_updates == max(1, round(share * full.tune.num_updates))
        same = full.tune.model_copy(update={"num_updates": method.tune.num_updates})
        assert method == full.model_copy(update={"tune": same})
    assert reduced.models == PAPER.models and reduced.datasets == PAPER.datasets


def test_a_share_above_one_is_refused_in_words():
    with pytest.raises(ConfigError, match=r"^scales\.reduced\.budget is 1\.5; expected a number of at most 1\.0\.$"):
        load({"scale": "reduced", "scales": {"reduced": {"budget": 1.5}}})


def test_tables_that_are_asked_for_go_before_the_scales_own():
    assert load({"scale": "paper", "tables": ["style"]}).tables == ["style"]
    assert "style" in load({"scale": "smoke"}).tables


def test_a_repository_without_an_entry_is_named():
    with pytest.raises(ConfigError, match=r"models.sdxl_turbo.base is 'me/turbo'.*repositories.yaml"):
        load({"scale": "paper", "models": {"sdxl_turbo": {"base": "me/turbo"}}})
    load({"scale": "smoke", "models": {"sdxl_turbo": {"base": "me/turbo"}}})  # made by the workflow


def test_a_mirror_and_a_folder_of_ones_own_need_none():
    load({"scale": "paper", "datasets": {"pickapic_v2": {"repo": "liuhuohuo2/pick-a-pic-v2"}}})
    load({"scale": "paper", "datasets": {"pickapic_v2": {"repo": "/data/pickapic"}}})


def test_weights_are_made_in_one_way():
    random = {"seed": 0, "num_pairs": 4, "num_prompts": 2}
    with pytest.raises(ConfigError, match="standin and random"):
        load({"scale": "smoke", "scales": {"smoke": {"random": random}}})


def test_weights_in_a_folder_of_ones_own_wait_for_no_repository():
    own = {"repo": "./my_lora", "file": "pytorch_lora_weights.safetensors", "scale": 0.5}
    entry = {**PAPER.models["sdxl_dmd2_lora"].model_dump(), "title": "Mine", "loras": [own]}
    row = {"label": "Mine", "model": "mine", "method": UNTUNED, "steps": 4}
    table = {**PAPER.table_entries["released"].model_dump(), "rows": [row]}
    scales = {"paper": {"default_tables": ["mine"]}}
    config = load({"scale": "paper", "models": {"mine": entry}, "tables": {"mine": table}, "scales": scales})
    assert Steps(config).model("mine") == Steps(config).repositories(entry["base"], entry["vae"])
    assert len(Steps(config).model("mine")) == 2 and "./my_lora" not in needed(config)
