"""The stand-in CLIPs: two small CLIPModels trained on captioned pictures, in the real folders.

Like the real ones they are judges (clip_score, the backbone of aesthetic_score and pick_score), and
their text towers are the frozen text encoders of the stand-in SDXL. A CLIP of the real size knows of
rims and sizes although few captions name them; these learn it from a small extra regression.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from pso.entries import Config
from pso.hub import Hub
from pso.miniature import world
from pso.miniature.common import CLIP_H, CLIP_L, job, pixels, steps
from pso.miniature.text import EOS, WINDOW, write_tokenizer

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 4,
}
PROJECTION = 32
MAX_LOGIT_SCALE = 100.0
IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]  # OpenAI's, which every real CLIP here uses
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]
NOTICED_WEIGHT = 0.5
NOISE = 0.15  # std of the noise on training pictures, so that a judge is not thrown by a generator's grain


def new_clip(tokenizer: CLIPTokenizer, activation: str) -> CLIPModel:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        **TEXT,
        **ids,
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": WINDOW,
        "hidden_act": activation,
        "projection_dim": PROJECTION,
    }
    vision = {**VISION, "image_size": world.RESOLUTION, "hidden_act": activation, "projection_dim": PROJECTION}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def clip_input(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] pixels -> CLIP's normalised input."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return ((x + 1) / 2 - mean) / std


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> dict:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")


def image_features(model: CLIPModel, x: torch.Tensor) -> torch.Tensor:
    """Unit vectors [B, D]."""
    return F.normalize(model.get_image_features(pixel_values=clip_input(x)).pooler_output, dim=-1)


def features(model: CLIPModel, tokenizer: CLIPTokenizer, x: torch.Tensor, captions: list[str]):
    """Unit image features [B, D] and text features [P, D]."""
    image = image_features(model, x)
    text = model.get_text_features(**tokens(tokenizer, captions)).pooler_output
    return image, F.normalize(text, dim=-1)


def noisy(x: torch.Tensor, rng: torch.Generator, most: float = NOISE) -> torch.Tensor:
    """Pictures with noise of up to this std, another one for each."""
    amount = most * torch.rand((len(x), 1, 1, 1), generator=rng)
    return x + amount * torch.randn(x.shape, generator=rng)


def save_clip(model: CLIPModel, folder: Path) -> None:
    """Weights, tokenizer and the image processor's settings, as the real repositories hold them."""
    model.save_pretrained(folder)
    write_tokenizer(folder, pad=EOS)
    size = world.RESOLUTION
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": size, "width": size},
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "do_rescale": True,
        "do_convert_rgb": True,
        "resample": 3,  # bicubic
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def train_one(config: Config, repo: str, activation: str, seed: int, hub: Hub) -> float:
    """Contrast every attribute combination with all others; zero-shot accuracy on new pictures."""
    fit = config.scale_entry.standin.clip
    torch.manual_seed(seed)
    noise, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    tokenizer = write_tokenizer(hub.root / repo)
    model = new_clip(tokenizer, activation)
    images, _, drawn, hidden = world.render_many(config.scale_entry.standin.num_images, seed)
    images, hidden = pixels(images), torch.from_numpy((hidden - hidden.mean(0)) / hidden.std(0))
    of = {a: [i for i, b in enumerate(drawn) if a == b] for a in world.ALL_ATTRIBUTES}
    known = [a for a in world.ALL_ATTRIBUTES if of[a]]
    noticed = torch.nn.Linear(PROJECTION, 2)  # see the module's docstring
    parameters = [*model.parameters(), *noticed.parameters()]
    for _, descend in steps(f"clip {repo}", parameters, fit, betas=(0.9, 0.98), weight_decay=0.01):
        shown = [known[i] for i in rng.permutation(len(known))[: fit.batch_size]]
        index = [int(rng.choice(of[a])) for a in shown]
        x = noisy(images[index], noise)
        captions = [a.caption(int(rng.integers(len(world.TEMPLATES)))) for a in shown]
        image, text = features(model, tokenizer, x, captions)
        logits = model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE) * image @ text.T
        match = torch.arange(len(shown))
        contrast = (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2
        descend(contrast + NOTICED_WEIGHT * F.mse_loss(noticed(image), hidden[index]))
    model.eval()
    save_clip(model, hub.root / repo)
    return zero_shot(model, tokenizer, seed + 1)


@torch.no_grad()
def zero_shot(model: CLIPModel, tokenizer: CLIPTokenizer, seed: int) -> float:
    images, _, drawn, _ = world.render_many(500, seed)
    captions = [a.caption() for a in world.ALL_ATTRIBUTES]
    image, text = features(model, tokenizer, pixels(images), captions)
    found = (image @ text.T).argmax(1).tolist()
    return round(float(np.mean([world.ALL_ATTRIBUTES[i] == a for i, a in zip(found, drawn, strict=True)])), 3)


def train(config: Config, hub: Hub) -> dict:
    seed = config.scale_entry.standin.seed
    jobs = ((CLIP_L, "quick_gelu", seed + 10), (CLIP_H, "gelu", seed + 20))
    return {"zero_shot_accuracy": {repo: train_one(config, repo, act, s, hub) for repo, act, s in jobs}}


if __name__ == "__main__":
    job("clip", train)
