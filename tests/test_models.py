"""Loading: the LoRA file in plain diffusers' hands, lost weights, and what a scorer says that it is."""

from pathlib import Path

import diffusers.schedulers.scheduling_lcm as scheduling_lcm
import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from hubs import own
from safetensors.torch import load_file, save_file

from eval.metrics import sharpness
from pso.config import load
from pso.hub import Hub
from pso.mdp import SDXL_SCHEDULE
from pso.models import TOKENIZER, chain_for, load_metric, load_policy
from pso.paths import LORA_FILE
from pso.provenance import UserError, fingerprint, sha256_of
from pso.rollout import INITIAL, keyed_noise, rollout

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


def test_half_precision_draws_the_same_picture_and_its_vae_is_the_finer_half(smoke):
    entry, hub = load({"scale": "smoke"}).models["sdxl_dmd2"], Hub(smoke / "results" / "smoke" / "hub")
    exact, half = load_policy(entry, hub), load_policy(entry, hub, torch.bfloat16)
    assert {half.unet.dtype, half.pipeline.text_encoder_2.dtype} == {torch.bfloat16}
    assert half.numerics["vae_dtype"] == "float16"
    chain, keys = chain_for("sdxl_dmd2", entry, 4), [("eval", 0, i) for i in range(4)]
    condition = exact.encode_prompts(["a red circle on the left, black background"] * 4)
    latents = rollout(exact, chain, condition, keys).x0
    true = exact.decode(latents).double()
    near = rollout(half, chain, half.encode_prompts(["a red circle on the left, black background"] * 4), keys).x0
    assert (exact.decode(near).double() - true).abs().mean() < 0.05 * true.std()
    fine = (half.decode(latents).double() - true).abs().mean()
    half.pipeline.vae.to(torch.bfloat16)
    coarse = (half.decode(latents).double() - true).abs().mean()
    assert fine < 0.5 and fine < 0.5 * coarse  # of a grey level


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


# ---- lost weights ----

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
PICK_SCORE = "yuvalkirstain/PickScore_v1/model.safetensors"
LOST = [  # file, what the sentence names
    (f"{BASE}/unet/diffusion_pytorch_model.safetensors", BASE),
    (f"{BASE}/text_encoder/model.safetensors", BASE),
    ("madebyollin/sdxl-vae-fp16-fix/diffusion_pytorch_model.safetensors", "madebyollin/sdxl-vae-fp16-fix"),
    (PICK_SCORE, "PickScore_v1"),
    ("christophschuhmann/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth", "aesthetic"),
]


def load_all(hub: Path) -> None:
    config = load({"scale": "smoke"})
    for name in ("sdxl", "sdxl_dmd2"):  # a student's own UNet stands in place of the base's, which is not read then
        load_policy(config.models[name], Hub(hub))
    for name in ("pick_score", "aesthetic_score"):
        load_metric(name, config.metrics[name], Hub(hub), "cpu")


@pytest.mark.parametrize("how", ["deleted", "truncated"])
@pytest.mark.parametrize(("file", "named"), LOST, ids=[f[0].split("/", 1)[1] for f in LOST])
def test_a_lost_weights_file_is_one_sentence(with_hub, file, named, how):
    hub = own(with_hub, "hub")
    load_all(hub)
    content = (hub / file).read_bytes()
    (hub / file).unlink()
    if how == "truncated":
        (hub / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as caught:
        load_all(hub)
    text = str(caught.value)
    assert named in text and "\n" not in text
    assert "fetch" in text or "makes it" in text
    if how == "truncated" and file.endswith(".safetensors"):
        assert f"{hub / file} is cut off" in text


# ---- scorers ----


def specs(hub: Path, *names: str) -> list[dict]:
    config = load({"scale": "smoke"})
    return [load_metric(name, config.metrics[name], Hub(hub), "cpu").spec for name in names]


def test_a_scorers_spec_tells_its_files_and_code(smoke, with_hub):
    hub = own(with_hub, "hub")
    pick, sharp, oracle = specs(hub, "pick_score", "sharpness", "oracle_accuracy")
    processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    expected = [PICK_SCORE, PICK_SCORE.replace("model.safetensors", "config.json")]
    expected += [f"{processor}/{name}" for name in TOKENIZER if (hub / processor / name).exists()]
    assert pick["files"] == {name: sha256_of(hub / name) for name in expected} and len(expected) > 3
    assert "files" not in sharp and "files" not in oracle
    assert pick["code"] == fingerprint("eval.metrics.pick_score")
    assert sharp["code"] == fingerprint("eval.metrics.sharpness")
    assert oracle["code"] == fingerprint("pso.miniature.oracle_metrics")
    assert "code" not in sharpness.Sharpness.spec  # what all of its class share stays as it is
    state = load_file(hub / PICK_SCORE)
    first = next(name for name in state if name.endswith("weight"))
    save_file({**state, first: state[first] + 1e-3}, hub / PICK_SCORE, {"format": "pt"})
    (again,) = specs(hub, "pick_score")
    assert {k for k in pick if pick[k] != again[k]} == {"files"}
    assert {k for k in pick["files"] if pick["files"][k] != again["files"][k]} == {PICK_SCORE}


def test_a_job_still_records_the_files_of_its_scorers(smoke):
    hub = Hub(smoke / "results/smoke/hub")
    load_metric("pick_score", load({"scale": "smoke"}).metrics["pick_score"], hub, "cpu")
    assert PICK_SCORE in {f"{entry['repo']}/{entry['file']}" for entry in hub.inputs()}
