"""The stand-in judges of taste: PickScore, fine-tuned from CLIP-H on preference pairs as the real one
was, and the aesthetic predictor, a linear-in-effect MLP on CLIP-L's image embedding."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from pso.entries import Config
from pso.hub import Hub
from pso.miniature import oracle, world
from pso.miniature.clip import CLIP_H, CLIP_L, MAX_LOGIT_SCALE, features, image_features, noisy, save_clip
from pso.miniature.common import AESTHETIC, PICK_SCORE, job, log, pixels, steps
from pso.miniature.data import pairs
from pso.standin_entries import Fit

HELD_OUT = 0.1  # share of the pairs on which agreement is measured
NOISE = 0.1
HEAD = (64, 48, 32, 16, 1)  # five linear layers as in the real MLP (1024, 128, 64, 16, 1), no activations between


def load_clip(hub: Hub, repo: str) -> tuple[CLIPModel, CLIPTokenizer]:
    hub.weights(repo)
    return CLIPModel.from_pretrained(hub.repo(repo)), CLIPTokenizer.from_pretrained(hub.repo(repo))


def unpack(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor, list[str], torch.Tensor]:
    """(first pictures, second pictures, captions, label of the first)."""
    first, second = (
        pixels(np.stack([np.asarray(Image.open(io.BytesIO(r[k]))) for r in rows])) for k in ("jpg_0", "jpg_1")
    )
    return first, second, [r["caption"] for r in rows], torch.tensor([r["label_0"] for r in rows])


def tune_on_pairs(name: str, fit: Fit, rows: list[dict], seed: int, hub: Hub) -> tuple[CLIPModel, CLIPTokenizer, float]:
    """CLIP-H on preference pairs, and its agreement with those held out.

    PickScore's loss: cross-entropy between the label and the softmax over the two scores.
    """
    model, tokenizer = load_clip(hub, CLIP_H)
    rng = torch.Generator().manual_seed(seed)
    first, second, captions, label = unpack(rows)
    held = int(HELD_OUT * len(label))
    for _, descend in steps(name, list(model.parameters()), fit, weight_decay=0.01):
        index = torch.randint(held, len(label), (fit.batch_size,), generator=rng)
        logits = _scores(model, tokenizer, first[index], second[index], [captions[i] for i in index], rng)
        wanted = torch.stack([label[index], 1 - label[index]], 1)
        descend(F.cross_entropy(logits, wanted))
    model.eval()
    with torch.no_grad():
        logits = _scores(model, tokenizer, first[:held], second[:held], captions[:held])
    return model, tokenizer, agreement(logits, label[:held])


def agreement(scores: torch.Tensor, label: torch.Tensor) -> float:
    """Share of decided pairs whose preferred picture has the higher of two scores [B, 2]."""
    decided = label != 0.5
    right = (scores.argmax(1) == 0) == (label == 1)
    return round(right[decided].float().mean().item(), 3)


def train_pick_score(config: Config, hub: Hub) -> dict:
    standin = config.scale_entry.standin
    seed = standin.seed + 40
    rows = list(pairs(standin.num_pairs, seed))
    model, _, agreed = tune_on_pairs("pick_score", standin.pick_score, rows, seed, hub)
    save_clip(model, hub.root / PICK_SCORE)
    return {"held_out_agreement": agreed}


def _scores(model, tokenizer, first, second, captions, noise: torch.Generator | None = None) -> torch.Tensor:
    """logit_scale * cos of each picture with its caption [B, 2]."""
    both = torch.cat([first, second])
    if noise is not None:
        both = noisy(both, noise, NOISE)
    image, text = features(model, tokenizer, both, captions)
    cos = (image.view(2, len(captions), -1) * text).sum(-1).T
    return model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE) * cos


def train_aesthetic(config: Config, hub: Hub) -> dict:
    """Rate rim, size and how cleanly the shape is drawn, from 4 to 7, from the picture alone."""
    standin = config.scale_entry.standin
    fit, seed = standin.aesthetic, standin.seed + 50
    torch.manual_seed(seed)
    model, _ = load_clip(hub, CLIP_L)
    model.requires_grad_(False).eval()
    images, *_ = world.render_many(standin.num_images, seed)
    seen = oracle.look(images)
    size = (seen.size - np.mean(world.SIZES)) / oracle.SIZE_SCALE
    rating = torch.tensor(5 + seen.glow + size + (seen.fit - 0.9), dtype=torch.float32)
    with torch.no_grad():
        embedded = torch.cat([image_features(model, part) for part in pixels(images).split(250)])
    head = new_head(embedded.shape[1])
    rng = torch.Generator().manual_seed(seed)
    for _, descend in steps("aesthetic", list(head.parameters()), fit):
        index = torch.randint(len(rating), (fit.batch_size,), generator=rng)
        descend(F.mse_loss(head(embedded[index])[:, 0], rating[index]))
    path = hub.root / AESTHETIC[0] / AESTHETIC[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({f"layers.{k}": v for k, v in head.state_dict().items()}, path)
    with torch.no_grad():
        correlation = np.corrcoef(head(embedded)[:, 0].numpy(), rating.numpy())[0, 1]
    return {"correlation": round(float(correlation), 3)}


def new_head(width: int) -> torch.nn.Sequential:
    """LAION's MLP: linear layers at 0, 2, 4, 6, 7 with dropout between them."""
    sizes, layers = (width, *HEAD), []
    for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers.append(torch.nn.Linear(a, b))
        layers += [torch.nn.Dropout(0.0)] if i < len(HEAD) - 2 else []
    return torch.nn.Sequential(*layers)


def train(config: Config, hub: Hub) -> dict:
    found = {"pick_score": train_pick_score(config, hub), "aesthetic": train_aesthetic(config, hub)}
    log.info("%s", found)
    return {"quality": found}


if __name__ == "__main__":
    job("judges", train)
