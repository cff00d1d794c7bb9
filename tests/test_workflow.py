"""The whole DAG at smoke scale, as a user runs it."""

import json
import re
import shutil

import pytest
from conftest import ROOT, run, snakemake

from pso.config import load
from pso.figures import KINDS, figure_names

TABLES = ["table1", "table2", "table3", "table4"]
TARGETS = ["all", "hub", *TABLES, "style", "claims", "figures", "spent", "cards"]


def test_smoke_makes_every_promised_file(smoke):
    base = smoke / "results" / "smoke"
    tables = [f"tables/{name}.{kind}" for name in TABLES for kind in ("csv", "tex", "md", "diff.md", "diff.json")]
    tables += [f"tables/style.{kind}" for kind in ("csv", "tex", "md")]  # the paper has figures of it only
    names = figure_names(load({"scale": "smoke"}))
    figures = [f"figures/{name}.{kind}" for name in names for kind in KINDS]
    models = [
        "preference/sdxl",
        "preference/sdxl_dmd2",
        "preference/sdxl_lcm",
        "concept/sdxl_turbo",
        "style/sdxl_turbo",
    ]
    manifests = [f"{model}/{what}.json" for model in models for what in ("images", "scores")]
    assert len(figures) > 20
    for name in [*tables, *figures, *manifests, "claims.md", "claims.json", "cost.md"]:
        assert (base / name).stat().st_size > 0, name


def test_a_run_leaves_its_lora_and_record_and_no_state(smoke):
    for method in ("pso_offline", "pso_online", "diffusion", "diffusion_grid"):
        run_folder = smoke / "results/smoke/preference/sdxl_dmd2" / method / "seed0"
        record = json.loads((run_folder / "run.json").read_text())
        assert record["steps"] == {"planned": 6, "done": 6}
        assert record["cost"]["unet_forwards"] > 0 and record["cost"]["peak_rss_gib"] > 0
        assert {"config", "config_digest", "inputs", "versions", "hardware", "code"} <= set(record)
        assert all(len(i["sha256"]) == 64 for i in record["inputs"])
        assert (run_folder / "lora" / "pytorch_lora_weights.safetensors").exists()
        assert (run_folder / "lora" / "README.md").read_text().startswith("---\nbase_model:\n")
        assert not (run_folder / "state").exists()


def test_ties_are_counted_not_lost(smoke):
    record = json.loads((smoke / "results/smoke/preference/sdxl_dmd2/pso_offline/seed0/run.json").read_text())
    counts = record["data"]
    assert counts["pairs"] + sum(counts["dropped"].values()) == 60


def test_claims_are_a_list_with_interval_and_verdict(smoke):
    claims = json.loads((smoke / "results/smoke/claims.json").read_text())
    assert isinstance(claims, list) and len(claims) >= 80
    measured = [claim for claim in claims if claim["estimate"] is not None]
    assert len(measured) >= 20
    for claim in measured:
        assert claim["verdict"] in ("holds", "fails", "inconclusive")
        assert claim["n"] == (75 if claim["table"] == "table3" else 12)  # 3 subjects x 25 prompts
        assert claim["interval"][0] <= claim["estimate"] <= claim["interval"][1]
    for claim in claims:
        assert claim["paper"]["verdict"] in ("holds", "does not hold", "equal", "not printed")
        assert (claim["estimate"] is None) == (claim["reason"] is not None)


def test_a_second_run_does_nothing(smoke):
    done = snakemake(cwd=smoke)
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout + done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_resolves(target, tmp_path):
    done = snakemake("-n", target, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rule", ["latents", "texts", "embeddings", "preference_model", "tune", "generate", "score"])
def test_what_loads_a_network_asks_for_the_gpu(rule):
    """`--resources gpu=1` promises one such job at a time; a second one beside a run would take the memory it counts
    on (pso/memory.py)."""
    text = "\n".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    (body,) = re.findall(rf"^rule {rule}:.*?(?=^rule |\Z)", text, re.M | re.S)
    assert re.search(r"resources:\s+(\*\*needs\(.*\),\s+)?gpu=1,", body)


def test_what_is_no_default_is_there_when_asked_for(tmp_path):
    """`extended`: each distilled model with every baseline in both forms, and at equal UNet forwards."""
    done = snakemake("-n", "extended", cwd=tmp_path, settings={"tables": ["extended"]})
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    for method in ("spo_transplant", "mapo_equal_forwards", "published_turbo_dpo"):
        assert f"model=sdxl_turbo, method={method}," in output
    refused = snakemake("-n", "extended", cwd=tmp_path)
    assert refused.returncode and "add --config tables=[extended]" in refused.stdout + refused.stderr


def test_a_deleted_table_is_made_again_without_training(smoke):
    (smoke / "results/smoke/tables/table1.md").unlink()
    done = snakemake("-n", cwd=smoke)
    output = done.stdout + done.stderr
    assert "rule table:" in output and "rule tune:" not in output
    assert snakemake(cwd=smoke).returncode == 0


@pytest.mark.parametrize("target", ["all", "table1", "claims", "figures", "spent"])
def test_committed_results_do_not_pass_for_made_ones(smoke, tmp_path, target):
    """A fresh clone holds tables, claims, figures and cost of the miniature, and nothing that they were made from."""
    for kept in ("tables", "figures", "claims.md", "claims.json", "cost.md"):
        made, copy = smoke / "results/smoke" / kept, tmp_path / "results/smoke" / kept
        copy.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if made.is_dir() else shutil.copy)(made, copy)
    done = snakemake("-n", target, cwd=tmp_path)
    assert done.returncode == 0 and "rule hub_vae:" in done.stdout + done.stderr


TUNE, SCORES, VIEWS = {"tune", "generate"}, {"score"}, {"table", "diff", "judge", "draw", "cards"}
CHANGES = [  # settings, rules that have to run again, rules that need not
    ({"scales": {"smoke": {"standin": {"seed": 1}}}}, {"hub_vae", "hub_clip", "hub_data", "hub_teacher"}, set()),
    ({"datasets": {"pickapic_test": {"num_seeds": 2}}}, {"generate"} | SCORES, {"hub_data", "tune"}),
    ({"scales": {"smoke": {"bootstrap_resamples": 300}}}, VIEWS, TUNE | SCORES),
    ({"scales": {"smoke": {"eval_seed": 7}}}, {"generate"} | SCORES, {"tune"}),
    ({"metrics": {"pick_score": {"module": "eval.metrics.clip_score"}}}, {"tune"} | SCORES, {"hub_vae", "latents"}),
    ({"metrics": {"pick_score": {"decimals": 3}}}, VIEWS, TUNE | SCORES),
    ({"methods": {"pso_offline": {"title": "x"}}}, VIEWS, TUNE | SCORES),
    ({"repositories": {"tianweiy/DMD2": {"licence": "x"}}}, {"cards"}, TUNE | SCORES | {"table"}),
    ({"methods": {"pso_offline": {"objective": {"beta": 7.0}}}}, TUNE, {"latents"}),
    ({"models": {"sdxl_dmd2": {"vae": None}}}, {"latents"} | TUNE, {"hub_vae"}),
    ({"models": {"sdxl_dmd2": {"grids": {3: [999, 666, 333]}}}}, {"generate"}, {"tune"}),
    ({"tables": ["table1"]}, {"texts"}, {"tune"}),  # of fewer sets; runs have what they had
]


def planned(cwd, **changes) -> set[str]:
    """Rules that `snakemake -n` would run after a change of settings."""
    done = snakemake("-n", cwd=cwd, settings=changes)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, re.MULTILINE))


@pytest.mark.parametrize(("changes", "again", "kept"), CHANGES, ids=[str(c[0])[:60] for c in CHANGES])
def test_a_change_of_settings_reaches_what_depends_on_it_and_nothing_else(smoke, changes, again, kept):
    rules = planned(smoke, **changes)
    assert again <= rules and not kept & rules


def test_the_workflow_passes_its_linter():
    done = run("snakemake", "--lint", "--config", "scale=smoke", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("scale=tiny", ["config.scale is 'tiny'", "miniature"]),
        ("sclae=smoke", ["config.sclae is not a known key", "did you mean scale?"]),
        ("seeds=abc", ["config.seeds is 'abc' (text)", "expected a list"]),
    ],
)
def test_wrong_config_is_one_sentence(config, words, tmp_path):
    snakefile = str(ROOT / "workflow" / "Snakefile")
    done = run("snakemake", "-s", snakefile, "-d", str(tmp_path), "-n", "--config", config, cwd=tmp_path)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("config: ")]
    assert all(word in line for word in words)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()
