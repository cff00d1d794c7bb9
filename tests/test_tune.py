"""Runs through the command line: kill and resume, bad input, and the LoRA file in plain diffusers' hands."""

import json
import re
from pathlib import Path

import diffusers.schedulers.scheduling_lcm as scheduling_lcm
import numpy as np
import pytest
import torch
from conftest import run, smoke_settings
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file

from pso.config import load
from pso.hub import Hub
from pso.mdp import SDXL_SCHEDULE
from pso.models import chain_for, load_policy
from pso.paths import LORA_FILE
from pso.provenance import UserError
from pso.rollout import INITIAL, keyed_noise, rollout

# kill -9 from inside, right after the checkpoint of update 3 is on disk
KILLED = """
import os, signal, sys
import pso.checkpoint as c
save = c.Checkpoints.save
def save_and_die(self, update, *rest):
    save(self, update, *rest)
    if update == 3:
        os.kill(os.getpid(), signal.SIGKILL)
c.Checkpoints.save = save_and_die
import pso.tune
pso.tune.main()
"""


def tune(results: Path, method: str, *more: str, program=("-m", "pso.tune"), settings: str | None = None):
    every = {"tune": {"checkpoint_every": 1}}
    settings = settings or smoke_settings(methods={method: every})
    return run(
        "python",
        *program,
        "--model",
        "sdxl_dmd2",
        "--method",
        method,
        "--results",
        str(results),
        "--set",
        settings,
        *more,
    )


def folder(results: Path, method: str) -> Path:
    return results / "smoke" / "preference" / "sdxl_dmd2" / method / "seed0"


@pytest.mark.parametrize("method", ["pso_offline", "pso_online", "pso", "diffusion", "spo_transplant"])
def test_kill_and_resume_gives_the_same_lora_bit_for_bit(method, with_hub, smoke, tmp_path_factory):
    done = tune(with_hub, method, program=("-c", KILLED))
    assert done.returncode == -9
    state = folder(with_hub, method) / "state"
    assert sorted(p.name for p in state.iterdir()) == ["update0000002", "update0000003"]  # the last two
    resumed = tune(with_hub, method)
    assert resumed.returncode == 0, resumed.stderr

    whole = tmp_path_factory.mktemp("whole")
    (whole / "smoke").mkdir()
    for name in ("hub", "cache"):
        (whole / "smoke" / name).symlink_to(smoke / "results" / "smoke" / name, target_is_directory=True)
    assert tune(whole, method).returncode == 0

    ours, theirs = (load_file(folder(r, method) / "lora" / LORA_FILE) for r in (with_hub, whole))
    assert ours.keys() == theirs.keys() and any("lora_B" in k or "lora.up" in k for k in ours)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert any(ours[k].abs().max() > 0 for k in ours if "lora_B" in k or "lora.up" in k)

    record = json.loads((folder(with_hub, method) / "run.json").read_text())
    assert record["resumed_at"] == [3]
    logs = [
        [json.loads(line) for line in (folder(r, method) / "train.jsonl").read_text().splitlines()]
        for r in (with_hub, whole)
    ]
    assert logs[0] == logs[1]
    assert [e["update"] for e in logs[0] if e["event"] == "update"] == [1, 2, 3, 4, 5, 6]
    whole_record = json.loads((folder(whole, method) / "run.json").read_text())
    assert record["cost"]["unet_forwards"] == whole_record["cost"]["unet_forwards"]


def test_other_settings_do_not_continue_a_checkpoint(with_hub):
    assert tune(with_hub, "pso_offline", program=("-c", KILLED)).returncode == -9
    other = smoke_settings(methods={"pso_offline": {"tune": {"checkpoint_every": 1, "learning_rate": 1.0e-3}}})
    done = tune(with_hub, "pso_offline", settings=other)
    assert done.returncode == 1
    assert "was written with other settings" in done.stderr and "to start this run anew" in done.stderr


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


# ---- the artefact through a user's door ----


def plain_pipeline(hub: Path, lora: Path | None) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(
        hub / "stabilityai/stable-diffusion-xl-base-1.0", add_watermarker=False
    )
    pipe.unet.load_state_dict(torch.load(hub / "tianweiy/DMD2/dmd2_sdxl_4step_unet_fp16.bin", weights_only=True))
    pipe.scheduler = LCMScheduler(**SDXL_SCHEDULE)
    if lora is not None:
        pipe.load_lora_weights(lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain_latents(pipe, prompt: str, key: tuple, shape, monkeypatch) -> torch.Tensor:
    """diffusers' own sampling loop, its step noise replaced by ours."""
    steps = iter([4, 3, 2])
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *a, **k: keyed_noise([key], next(steps), shape))
    return pipe(
        prompt, timesteps=[999, 749, 499, 249], guidance_scale=0.0, latents=keyed_noise([key], INITIAL, shape),
        height=32, width=32, output_type="latent",
    ).images  # fmt: skip


def test_the_lora_loads_in_plain_diffusers_and_gives_our_image(smoke, tmp_path, monkeypatch):
    hub = smoke / "results" / "smoke" / "hub"
    config = load({"scale": "smoke"})
    entry = config.models["sdxl_dmd2"]
    policy = load_policy(entry, Hub(hub))
    policy.add_lora(entry.lora_rank, entry.lora_targets, seed=0)
    torch.manual_seed(0)
    for parameter in policy.lora_parameters():  # an adapter that visibly does something
        torch.nn.init.normal_(parameter, std=0.1)
    prompt, key = "a red circle on the left, black background", ("eval", 0, "prompt")
    chain = chain_for("sdxl_dmd2", entry, 4)
    latents = rollout(policy, chain, policy.encode_prompts([prompt]), [key]).x0  # before any file is written
    policy.save_lora(tmp_path)

    theirs = plain_latents(plain_pipeline(hub, tmp_path), prompt, key, policy.latent_shape, monkeypatch)
    without = plain_latents(plain_pipeline(hub, None), prompt, key, policy.latent_shape, monkeypatch)
    change = (theirs - without).abs().mean()
    assert change > 0.1  # loading was not silently ignored
    assert (latents - theirs).abs().max() < 1e-3 * change  # nor half of the file
    ours, image = (policy.decode(x).numpy().astype(int) for x in (latents, theirs))
    assert np.abs(ours - image).max() <= 1


def test_a_file_with_two_kinds_of_key_names_would_lose_half(smoke, tmp_path, monkeypatch):
    """Why the file keeps PEFT's names: the wrong variant must be caught by the check above."""
    hub = smoke / "results" / "smoke" / "hub"
    entry = load({"scale": "smoke"}).models["sdxl_dmd2"]
    policy = load_policy(entry, Hub(hub))
    policy.add_lora(entry.lora_rank, entry.lora_targets, seed=0)
    mixed = convert_state_dict_to_diffusers(policy.lora_state())
    StableDiffusionXLPipeline.save_lora_weights(str(tmp_path), unet_lora_layers=mixed, weight_name=LORA_FILE)
    count = len(policy.lora_state())
    with pytest.raises(UserError, match=rf"holds {count} tensors, but diffusers loaded \d+ of them"):
        policy.load_lora(tmp_path)
    policy.unload_lora()
    policy.add_lora(entry.lora_rank, entry.lora_targets, seed=0)
    policy.save_lora(tmp_path)
    policy.load_lora(tmp_path)
    assert len(policy.lora_state()) == count


def test_the_tuned_lora_of_a_run_has_diffusers_keys(smoke):
    state = load_file(folder(smoke / "results", "pso_offline") / "lora" / LORA_FILE)
    assert all(k.startswith("unet.") and (".lora_A." in k or ".lora_B." in k) for k in state)


# ---- bad input: one sentence, a non-zero exit, nothing half-written ----


def last_line(done) -> str:
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


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
    assert "is not a state dict of stabilityai/stable-diffusion-xl-base-1.0's UNet" in line and "fetch it again" in line


def test_unknown_method(with_hub):
    line = last_line(tune(with_hub, "pso_offlin", settings=smoke_settings()))
    assert line.startswith("tune: --method is 'pso_offlin'; expected one of") and "pso_offline" in line
    assert not folder(with_hub, "pso_offlin").exists()


def test_a_learning_rate_that_blows_up_stops_with_a_sentence(with_hub):
    settings = smoke_settings(methods={"diffusion": {"tune": {"learning_rate": 1.0e30}}})
    line = last_line(tune(with_hub, "diffusion", settings=settings))
    assert "gradient norm" in line and "Lower methods.tune.learning_rate" in line
    assert not (folder(with_hub, "diffusion") / "run.json").exists()
