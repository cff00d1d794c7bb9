"""Minutes and memory that jobs ask a cluster for: against the estimate, in every rule, in no job's params."""

import json
import math
import re
import subprocess
import sys

import pytest
from conftest import ROOT, snakemake

from pso import campaign, estimate, resources
from pso.config import load
from pso.resources import KeptFlops, Needs, published_sizes
from pso.work import Call

MIRROR = {"pickapic_v2": {"repo": "liuhuohuo2/pick-a-pic-v2"}}
PAPER = {"scale": "paper", "datasets": MIRROR}
RULE = re.compile(r"^( *)rule(?: (\w+))?:(.*?)(?=^\1\S|\Z)", re.M | re.S)
NO_SHELL = {"all", "hub", "claims", "figures", "spent"}


@pytest.fixture(scope="module")
def paper():
    return load(PAPER)


@pytest.fixture(scope="module")
def told(paper):
    return estimate.estimate(paper)


@pytest.fixture(scope="module")
def needs(paper):
    return Needs(paper)


def job_of(told, rule, name):
    (found,) = [job for job in told["jobs"] if (job["rule"], job["job"]) == (rule, name)]
    return found


# ---- the published sizes ----


def test_a_run_has_twice_what_the_estimate_counts_and_what_is_beside_it(told, needs, monkeypatch):
    job = job_of(told, "tune", "preference sdxl_dmd2 pso_online seed0")
    weights = 6.8 + 0.34 + 5.53 + 3.95  # base, VAE, DMD2's UNet, PickScore
    updates = needs.config.methods["pso_online"].tune.num_updates
    pictures = job["decode"]  # of 1024 px
    seconds = job["gpu_hours"] * 3600 + 300 + weights / 0.1 + 0.2 * updates + 0.12 * pictures
    assert needs.seconds("tune", "preference sdxl_dmd2 pso_online seed0") == pytest.approx(seconds)
    assert needs.minutes("tune", "preference sdxl_dmd2 pso_online seed0") == 48 * 60 < 2 * seconds / 60
    monkeypatch.setitem(vars(needs), "longest", 1e6)
    assert needs.minutes("tune", "preference sdxl_dmd2 pso_online seed0") == math.ceil(2 * seconds / 60)


def test_all_limits_together_are_the_estimate_with_what_is_beside_it(told, needs):
    """An independent sum over rules: GPU-hours, pictures by their area, updates, loading."""
    each = {"latents": 0.15, "preference_model": 0.12, "tune": 0.12, "generate": 0.6, "score": 0.5, "embeddings": 0.05}
    jobs = [job for job in told["jobs"] if job["rule"] in each]
    assert {job["rule"] for job in told["jobs"]} - set(each) == {"fetch", "texts"}
    images = {job["job"]: job["images"] for job in jobs if job["rule"] == "generate"}
    expected = 3600 * sum(job["gpu_hours"] for job in jobs) + 300 * len(jobs)
    expected += 0.2 * sum(updates_of(needs.config, job) for job in jobs if job["rule"] == "tune")
    for job in jobs:
        area = 1 if job["rule"] == "embeddings" else (needs.config.models[model_of(job)].resolution / 1024) ** 2
        seen = {"generate": job["images"], "score": images.get(job["job"], 0), "embeddings": job["scored"]}
        expected += each[job["rule"]] * area * seen.get(job["rule"], job["decode"] + job["encode"])
    reading = sum(needs.seconds(job["rule"], job["job"]) for job in jobs) - expected
    weights = (6.8 + 0.34) / 0.1 * len(jobs)  # SDXL and its VAE in every job: about what a job loads
    data = 322.1 / 0.1 * 5  # Pick-a-Pic for four models and CLIP
    assert data + weights < reading < data + 3 * weights


def model_of(job):
    names = job["job"].split()
    return names[0] if job["rule"] in ("latents", "preference_model") else names[1]


def updates_of(config, job):
    return config.methods[job["job"].split()[2]].tune.num_updates


def test_a_later_attempt_asks_for_more(needs):
    for rule, job in (("tune", "preference sdxl sft seed0"), ("score", "preference sdxl"), ("table", "")):
        minutes, mb = needs.minutes(rule, job), needs.mem_mb(rule, job)
        assert (needs.minutes(rule, job, 3), needs.mem_mb(rule, job, 3)) == (3 * minutes, 3 * mb)


def test_no_job_asks_for_more_time_than_a_partition_gives(needs, tmp_path, monkeypatch):
    long = ("tune", "preference sdxl_dmd2 pso_online seed0")
    assert needs.minutes(*long, 3) == 48 * 60 < 3 * needs.seconds(*long) / 60  # it goes on in the next attempt
    own = tmp_path / "partitions.yaml"
    own.write_text("partitions:\n  short: {max_runtime: 6h}\n  long: {max_runtime: 1-12}\n")
    monkeypatch.setattr(resources, "PARTITIONS", own)
    assert Needs(needs.config).minutes(*long) == 36 * 60


def test_memory_holds_the_weights_twice(needs):
    files = 6.8 + 0.34 + 5.53
    assert needs.mem_mb("generate", "preference sdxl_dmd2") == math.ceil(6000 + 4000 + 2000 * files)
    with_deltas = needs.mem_mb("generate", "preference sdxl_dmd2_dpo_delta")
    assert with_deltas - needs.mem_mb("generate", "preference sdxl_dmd2") == pytest.approx(2000 * 10.3, abs=1)
    online = 10_000 + 2000 * (files + 3.95)  # its prompts' text conditions stay in their file
    assert needs.mem_mb("tune", "preference sdxl_dmd2 pso_online seed0") == math.ceil(online)
    assert needs.mem_mb("fetch", "yuvalkirstain/PickScore_v1") < 5_000


def test_a_download_has_time_for_its_size(needs):
    assert needs.minutes("fetch", MIRROR["pickapic_v2"]["repo"]) == math.ceil(2 * (300 + 322.1 / 0.03) / 60)
    assert needs.minutes("fetch", "bert-base-uncased") < 15


def test_untuned_rows_alone_take_less(needs):
    for rule in ("generate", "score"):
        alone = needs.seconds(f"{rule}_untuned", "preference sdxl_dmd2")
        assert 300 < alone < needs.seconds(rule, "preference sdxl_dmd2") / 2
    calls = needs.work("generate_untuned", "preference sdxl_dmd2").parts["images"]
    assert calls and not any(call.network == "theta" for call in calls)


def test_a_run_that_no_table_asks_for_has_the_same_limits(needs):
    asked, other = ("preference sdxl_dmd2 pso_offline seed" + seed for seed in "07")
    assert needs.minutes("tune", other) == needs.minutes("tune", asked)


def test_a_source_of_the_users_own_has_a_day(monkeypatch, paper):
    monkeypatch.setattr(campaign.work, "declared", lambda module: {"SOURCE": "mine:Pairs", "NEEDS_PRE": True})
    assert Needs(paper).minutes("tune", "preference sdxl sft seed0") == 2 * 24 * 60
    assert Needs(load({"scale": "smoke"})).minutes("tune", "preference sdxl sft seed0") == 5 * 60


def test_weights_of_the_users_own_need_no_entry(paper):
    entry = paper.models["sdxl"].model_copy(update={"base": "someone/else"})
    config = paper.model_copy(update={"models": {**paper.models, "sdxl": entry}})
    needs = Needs(config)
    mb = needs._gb(["someone/else"]), needs._gb(["/my/pairs"])
    assert mb == (resources.OWN_GB, resources.OWN_GB)


# ---- FLOPs ----


def test_figures_count_whatever_library_counted_them(tmp_path):
    kept = json.loads(estimate.FIGURES.read_text())
    other = kept | {"versions": dict.fromkeys(kept["versions"], "0.1")}
    (tmp_path / "count.json").write_text(json.dumps(other))
    call = Call("unet", 1024)
    assert estimate.kept_flops(tmp_path / "count.json") == {}
    assert KeptFlops(tmp_path / "count.json").of(call) == kept["flops"]["UNet 1024 px, forward"] == KeptFlops().of(call)


def test_without_figures_a_limit_is_a_little_higher(tmp_path):
    """results/ may be cleared; and other sizes and ranks were not counted."""
    none, kept = KeptFlops(tmp_path / "count.json"), KeptFlops()
    for network in ("unet", "decode", "encode"):
        for side in (512, 1024):
            assert kept.of(Call(network, side)) <= none.of(Call(network, side)) <= 1.3 * kept.of(Call(network, side))
    for network in ("theta", "backward"):
        assert kept.of(Call(network, 1024, 64)) <= none.of(Call(network, 1024, 64))
    for network in ("text", "clip_h14", "clip_l14", "clip_b32", "image_reward", "dino", "clip_h14_text"):
        assert kept.of(Call(network)) <= none.of(Call(network)), network
    assert kept.of(Call("unet", 2048)) > 4 * kept.of(Call("unet", 1024))


def test_everything_that_the_tables_call_is_kept(paper):
    kept = KeptFlops().kept
    missing = {estimate.kept_name(call) for item in campaign.works(paper) for call in estimate.all_calls([item])}
    assert not missing - set(kept)


# ---- the other scales ----


@pytest.mark.parametrize("scale", ["miniature", "smoke", "rehearsal"])
def test_other_scales_have_limits_for_every_job(scale):
    config = load({"scale": scale})
    needs = Needs(config)
    assert published_sizes(config) == (scale == "rehearsal")
    for rule, job in needs.works:
        assert 10 <= needs.minutes(rule, job) <= 150 and 2000 <= needs.mem_mb(rule, job) < 80_000, (rule, job)


def test_the_miniature_took_less_than_its_limits():
    """results/miniature/cost.md: a third of every limit at most, in CPU seconds: a job has one thread, and its wall
    seconds tell as much of what else ran on the machine."""
    needs, seen = Needs(load({"scale": "miniature"})), 0
    for name, seconds, gib in measured():
        *folders, last = name.split("/")
        if folders[0] == "hub":
            rule, job = ("preference_model", last) if last.startswith("preference_model") else (f"hub_{last}", "")
        elif last in ("images", "scores"):
            rule, job = {"images": "generate", "scores": "score"}[last], " ".join(folders)
        elif last == "run":
            rule, job = "tune", f"{'/'.join(folders[:-3])} {folders[-3]} {folders[-2]} {folders[-1]}"
        else:
            continue
        seen += 1
        assert seconds <= needs.minutes(rule, job) * 60 / 3, name
        assert gib * 1074 <= needs.mem_mb(rule, job) / 1.4, name
    assert seen > 90


def measured():
    text = (ROOT / "results/miniature/cost.md").read_text()
    for job, seconds, gib in re.findall(r"^\| (\w+/\S+) +\| +\d+ \| +(\d+) \| +([\d.]+) \|", text, re.M):
        yield job, int(seconds), float(gib)


# ---- in the workflow ----


def test_every_rule_that_makes_something_has_both():
    local = {"cost", "doctor", "progress"}
    seen = set()
    for path in sorted((ROOT / "workflow").rglob("*.smk")):
        for _, name, body in RULE.findall(path.read_text()):
            if name in NO_SHELL | local:
                continue
            seen.add(name)
            kind = re.search(r'\*\*needs\(\s*"(\w+)"', body)
            assert kind is not None, f"{path.name}: rule {name}"
            assert name in ("", kind[1])
    assert {"tune", "generate", "score", "table", "fetch", "draw_weights", "hub_vae", "verify_scorers"} <= seen


@pytest.mark.parametrize("scale", ["smoke", "paper"])
def test_a_dry_run_shows_them_and_no_param_has_them(scale, tmp_path):
    settings = {"datasets": MIRROR} if scale == "paper" else None
    done = snakemake("-n", "all", cwd=tmp_path, scale=scale, settings=settings)
    assert done.returncode == 0, done.stderr
    blocks = re.split(r"^(?:local)?rule ", done.stdout + done.stderr, flags=re.M)[1:]
    jobs = [(block.partition(":")[0], block) for block in blocks]
    assert len(jobs) > 80
    for name, body in jobs:
        if name not in NO_SHELL:
            assert re.search(r"runtime=\d+", body) and re.search(r"mem_mb=\d+", body), name
    config = Needs(load(PAPER if scale == "paper" else {"scale": scale}))
    (body,) = [b for name, b in jobs if name == "tune" and "method=pso_offline," in b and "model=sdxl_dmd2," in b]
    assert f"runtime={config.minutes('tune', 'preference sdxl_dmd2 pso_offline seed0')}," in body
    for path in (ROOT / "workflow").rglob("*.smk"):
        assert not re.search(r"params:(?:(?!\n {4,8}\w+:\n).)*NEEDS", path.read_text(), re.S), path


def test_torch_is_not_loaded():
    code = (
        "import sys; from pso.config import load; from pso.resources import Needs\n"
        f"n = Needs(load({PAPER!r}))\n"
        "assert all(n.minutes(r, j) and n.mem_mb(r, j) for r, j in n.works)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
