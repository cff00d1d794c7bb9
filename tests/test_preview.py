"""The preview VAE: rewards in training and probes look through it, and nothing else does."""

from types import SimpleNamespace

import pytest
import torch
import toy
from diffusers import AutoencoderTiny
from formats import BASE, VAE
from safetensors.torch import load_file, save_file
from test_config import refusal
from toy import SHAPE, TIMES, Judge, new_policy, quiet  # noqa: F401

from pso import pso_online
from pso.config import load
from pso.entries import ModelEntry
from pso.hub import Hub
from pso.mdp import Renoise
from pso.models import load_policy
from pso.probe import Probe
from pso.provenance import UserError
from pso.sources import Given, OnlinePairs
from pso.steps import model_repositories
from pso.tune import Run, tuned_model

TINY = "madebyollin/taesdxl"


def tiny(blocks: int = 2, **more) -> AutoencoderTiny:
    """Of 2 px a latent, as the toy's VAE."""
    sizes = {f"{part}_block_out_channels": (8,) * blocks for part in ("encoder", "decoder")}
    counts = {f"num_{part}_blocks": (1,) * blocks for part in ("encoder", "decoder")}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return AutoencoderTiny(**sizes, **counts, **more)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The toy's pipeline and VAE, and a tiny VAE in the published files."""
    root = tmp_path_factory.mktemp("hub")
    pipeline = toy.pipeline()
    pipeline.save_pretrained(root / BASE)
    pipeline.vae.save_pretrained(root / VAE)
    tiny().save_pretrained(root / TINY)
    tiny(3).save_pretrained(root / "other/px")
    tiny(scaling_factor=0.5).save_pretrained(root / "other/scale")
    pipeline.vae.save_pretrained(root / "other/kind")
    return root


def entry(**more) -> ModelEntry:
    given = {"title": "x", "base": BASE, "vae": VAE, "sampler": "renoise", "grids": {4: TIMES}, "resolution": 16}
    return ModelEntry(**{**given, "guidance_scale": 0.0, "lora_rank": 4, "tuned_steps": 4, **more})


def loaded(hub, preview: bool, **more):
    return load_policy(entry(**more), Hub(hub), device="cpu", name="mine", preview=preview)


LATENTS = toy.randn(3, 2, *SHAPE)


def test_no_model_of_ours_has_one():
    models = load().models
    assert models and all(model.preview_vae is None for model in models.values())
    assert load({"models": {"sdxl_dmd2": {"preview_vae": TINY}}}).models["sdxl_dmd2"].preview_vae == TINY


def test_preview_is_the_tiny_vaes_picture_and_decode_is_not(hub):
    policy, plain = loaded(hub, True, preview_vae=TINY), loaded(hub, True)
    with torch.no_grad():
        sample = tiny().decode(LATENTS).sample  # latents as the UNet has them: they are not scaled
    expected = ((sample.double() + 1) * 127.5).clamp(0, 255).round().permute(0, 2, 3, 1)
    assert int((policy.preview(LATENTS).double() - expected).abs().max()) <= 1
    assert torch.equal(policy.decode(LATENTS), plain.decode(LATENTS)), "reported pictures are the VAE's"
    assert not torch.equal(policy.preview(LATENTS), policy.decode(LATENTS))
    assert torch.equal(plain.preview(LATENTS), plain.decode(LATENTS))


def test_only_what_is_tuned_loads_it(hub):
    assert loaded(hub, False, preview_vae=TINY).previewed is None, "as eval/generate.py loads a model"
    config = SimpleNamespace(
        models={"mine": entry(preview_vae=TINY)}, scale_entry=SimpleNamespace(dtype="float32", speed=None)
    )
    files = Hub(hub)
    policy, _ = tuned_model(Run(config, "preference", "mine", "own", 0, hub, hub), files, torch.device("cpu"))
    assert policy.previewed is not None and {i["file"] for i in files.inputs() if i["repo"] == TINY} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


def test_run_json_tells(hub):
    assert loaded(hub, True, preview_vae=TINY).numerics["preview_vae"] == TINY
    assert "preview_vae" not in loaded(hub, True).numerics


def test_it_is_fetched_for_its_model_and_has_to_have_an_entry():
    config = load({"models": {"sdxl_dmd2": {"preview_vae": TINY}}})
    assert TINY in model_repositories(config, "sdxl_dmd2") and TINY not in model_repositories(config, "sdxl")
    assert TINY not in model_repositories(load(), "sdxl_dmd2")
    sentence = refusal({"scale": "paper", "models": {"sdxl_dmd2": {"preview_vae": "me/tiny"}}})
    assert sentence.startswith("models.sdxl_dmd2.preview_vae is 'me/tiny' (text), which has no entry in repositories")


# ---- who looks through it ----


class Previewed(toy.FakePolicy):
    """The preview is black, the picture white."""

    def decode(self, latents):
        return torch.full((len(latents), 4, 4, 3), 255, dtype=torch.uint8)

    def preview(self, latents):
        return torch.zeros((len(latents), 4, 4, 3), dtype=torch.uint8)


class Seen(Judge):
    """Remembers how bright its pictures were."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def score(self, images, prompts, t=0):
        scores = super().score(images, prompts, t)
        self.seen |= set(scores.tolist())
        return scores


def test_online_labels_are_the_previews():
    judge = Seen()
    cfg = pso_online.Config(beta=5.0, timestep_mode="trajectory_sum", pairs_per_round=4)
    given = Given(Previewed(), Renoise(TIMES), cfg, 0, 4, prompts=toy.TEXTS, condition=toy.CONDITION, reward=judge)
    OnlinePairs(given).batch(0)
    assert judge.seen == {0.0}


def test_probes_look_at_previews_too():
    policy, judge = new_policy(), Seen()
    policy.preview = Previewed().preview
    Probe(policy, Renoise(TIMES), toy.PROMPTS, policy.encode_prompts(toy.PROMPTS), judge, {})()
    assert judge.seen == {0.0}


# ---- files that do not fit ----


@pytest.mark.parametrize(
    ("repo", "words"),
    [
        ("other/px", "makes 4 px of a latent .* expected 2 px of 4 channels, scaled by 1"),
        ("other/scale", "scaled by 0.5; expected"),
        ("other/kind", "is of a AutoencoderKL; expected AutoencoderTiny"),
        ("other/none", "other/none"),
    ],
)
def test_another_vae_is_a_sentence(hub, repo, words):
    with pytest.raises(UserError, match=words):
        loaded(hub, True, preview_vae=repo)


def test_a_missing_tensor_is_named(hub, tmp_path):
    folder = hub / "other/cut"
    tiny().save_pretrained(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    gone = sorted(state)[0]
    save_file({key: value for key, value in state.items() if key != gone}, path)
    with pytest.raises(UserError, match=gone):
        loaded(hub, True, preview_vae="other/cut")
