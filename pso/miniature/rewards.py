"""The stand-in judges that read picture and prompt together or were tuned like PickScore, in the published formats:
ImageReward, made from nothing, and HPS v2 and v2.1, tuned from CLIP-H on other people's choices.

ImageReward's BLIP learns in three steps, as the real one did. It sees: its vision tower names what pictures show. It
reads: its text tower tells right captions from wrong ones, each word of them too (in place of BLIP's caption loss,
which needs more text than this world has). It ranks: ImageReward's own loss on preference pairs, with wrong captions
of the preferred picture as further losers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextModel, BlipVisionConfig, BlipVisionModel

from pso.config import import_module
from pso.entries import Config
from pso.hub import Hub
from pso.miniature import world
from pso.miniature.clip import clip_input, features, noisy
from pso.miniature.common import job, log, pixels, steps
from pso.miniature.data import OPTIONS, mistaken, pairs
from pso.miniature.judges import HELD_OUT, NOISE, agreement, new_head, tune_on_pairs, unpack
from pso.standin_entries import Fit

IMAGE_REWARD, BERT, HPS = "THUDM/ImageReward", "bert-base-uncased", "xswu/HPSv2"
WIDTH, TEXT_WIDTH, PROJECTION = 128, 64, 16
VISION = {"hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 2, "patch_size": 8}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
MISMATCH_WEIGHT = 0.5  # of the wrong captions among the losers


def scorer_of(config: Config, metric: str) -> ModuleType:
    """The module that will read the files: it knows their names and constants."""
    return import_module(config.metrics[metric].module, f"metrics.{metric}.module")


def write_bert(folder: Path) -> BertTokenizer:
    """vocab.txt in which every word of the world is one token; characters are the fall-back."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {w for caption in world.OF_CAPTION for w in caption.replace(",", " , ").replace(":", " : ").split()}
    tokens = [*SPECIAL, *sorted({*words, *CHARACTERS}), *(f"##{c}" for c in CHARACTERS)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}\n')
    return BertTokenizer.from_pretrained(folder, local_files_only=True)


def write_med_config(path: Path, vocabulary: int) -> None:
    """As BLIP's, with [DEC] and [ENC] counted and an encoder width that its code overwrites."""
    med = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": vocabulary + 2,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "encoder_width": TEXT_WIDTH,
        "add_cross_attention": True,
    }
    path.write_text(json.dumps(med, indent=2) + "\n")


class Reward(nn.Module):
    """BLIP's two towers and the head, as the scorer runs them."""

    def __init__(self, scorer: ModuleType, tokenizer: BertTokenizer, med_config: Path):
        super().__init__()
        vision = BlipVisionConfig(
            **VISION,
            num_attention_heads=WIDTH // scorer.HEAD_WIDTH,
            image_size=world.RESOLUTION,
            layer_norm_eps=scorer.VISION_EPS,
            initializer_range=0.02,
        )
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(scorer.text_config(med_config, WIDTH), add_pooling_layer=False)
        self.head = new_head(TEXT_WIDTH)
        self.tokenizer = tokenizer

    def see(self, x: Tensor) -> Tensor:
        """[-1, 1] pixels -> the vision tower's tokens."""
        return self.vision(pixel_values=clip_input(x)).last_hidden_state

    def read(self, seen: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens [B, L] and the text tower's states [B, L, D]."""
        tokens = self.tokenizer(captions, padding=True, return_tensors="pt", return_token_type_ids=False)
        return tokens["input_ids"], self.text(**tokens, encoder_hidden_states=seen, is_decoder=False).last_hidden_state

    def forward(self, seen: Tensor, captions: list[str]) -> Tensor:
        """Reward [B]."""
        return self.head(self.read(seen, captions)[1][:, 0])[:, 0]


def any_wording(attributes: world.Attributes, rng: np.random.Generator) -> str:
    return attributes.caption(int(rng.integers(len(world.TEMPLATES))))


def train_vision(model: Reward, fit: Fit, drawn: list, images: Tensor, hidden: Tensor, rng: torch.Generator) -> None:
    """Name the attributes of a picture and guess rim and size, from the class token."""
    kinds = [list(options) for options in OPTIONS.values()]
    classes = torch.tensor(
        [[kind.index(getattr(a, name)) for name, kind in zip(OPTIONS, kinds, strict=True)] for a in drawn]
    )
    name = nn.Linear(WIDTH, sum(map(len, kinds)) + 2)
    parameters = [*model.vision.parameters(), *name.parameters()]
    for _, descend in steps("image_reward sees", parameters, fit, betas=(0.9, 0.98), weight_decay=0.01):
        index = torch.randint(len(images), (fit.batch_size,), generator=rng)
        *logits, guess = name(model.see(noisy(images[index], rng))[:, 0]).split([*map(len, kinds), 2], dim=1)
        named = sum(F.cross_entropy(found, classes[index, i]) for i, found in enumerate(logits))
        descend(named + F.mse_loss(guess, hidden[index]))


def train_text(
    model: Reward, fit: Fit, drawn: list, images: Tensor, rng: torch.Generator, draw: np.random.Generator
) -> None:
    """Is the caption right? And each word of it that names something? Half of the captions have one mistake."""
    ids = model.tokenizer.get_vocab()
    named = torch.zeros(model.text.config.vocab_size, dtype=torch.bool)
    named[[ids[value] for options in OPTIONS.values() for value in options]] = True
    word = nn.Linear(TEXT_WIDTH, 1)
    parameters = [*model.text.parameters(), *model.head.parameters(), *word.parameters()]
    for _, descend in steps("image_reward reads", parameters, fit, betas=(0.9, 0.98), weight_decay=0.01):
        index = torch.randint(len(images), (fit.batch_size,), generator=rng)
        with torch.no_grad():
            seen = model.see(noisy(images[index], rng))
        shown = [drawn[i] for i in index]
        captions = [any_wording(a, draw) for a in [*shown, *(mistaken(a, draw) for a in shown)]]
        tokens, states = model.read(torch.cat([seen, seen]), captions)
        right = torch.zeros(len(shown), len(named), dtype=torch.bool)
        for row, attributes in zip(right, shown, strict=True):
            row[[ids[value] for value in vars(attributes).values()]] = True
        each = named[tokens]
        words = F.binary_cross_entropy_with_logits(
            word(states)[..., 0][each], torch.cat([right, right]).gather(1, tokens)[each].float()
        )
        whole = torch.tensor([1.0, 0.0]).repeat_interleave(len(shown))
        descend(words + F.binary_cross_entropy_with_logits(model.head(states[:, 0])[:, 0], whole))


def train_ranking(model: Reward, fit: Fit, rows: list, rng: torch.Generator, draw: np.random.Generator) -> None:
    """-log sigma(r_i - r_j) of ImageReward, where a caption with a mistake loses too."""
    first, second, captions, label = rows
    parameters = list(model.parameters())
    for _, descend in steps("image_reward ranks", parameters, fit, weight_decay=0.01):
        index = torch.randint(len(label), (fit.batch_size,), generator=rng)
        asked = [captions[i] for i in index]
        wrong = [any_wording(mistaken(world.OF_CAPTION[c], draw), draw) for c in asked]
        seen = model.see(noisy(torch.cat([first[index], second[index]]), rng, NOISE))
        won = label[index] == 1
        preferred = torch.where(won[:, None, None], *seen.chunk(2))
        one, two, lost = model(torch.cat([seen, preferred]), [*asked, *asked, *wrong]).chunk(3)
        ranked = F.binary_cross_entropy_with_logits(one - two, label[index])
        descend(ranked + MISMATCH_WEIGHT * F.softplus(lost - torch.where(won, one, two)).mean())


@torch.no_grad()
def normalise(model: Reward, rewards: Tensor, mean: float, std: float) -> None:
    """Scale the last layer so that its output has this mean and standard deviation where it gave these rewards."""
    last, scale = model.head[-1], std / rewards.std()
    last.weight.mul_(scale)
    last.bias.copy_((last.bias - rewards.mean()) * scale + mean)


def published_state(model: Reward, scorer: ModuleType) -> dict[str, Tensor]:
    """Under the names of ImageReward.pt, with what it holds and no score needs."""
    text = model.text.embeddings
    unused = {"vision_proj": nn.Linear(WIDTH, PROJECTION), "text_proj": nn.Linear(TEXT_WIDTH, PROJECTION)}
    return {
        **{scorer.vision_name(key): value for key, value in model.vision.state_dict().items()},
        scorer.text_name("embeddings.position_ids"): text.position_ids.clone(),
        **{scorer.text_name(key): value for key, value in model.text.state_dict().items()},
        **{f"blip.{n}.{key}": value for n, layer in unused.items() for key, value in layer.state_dict().items()},
        **{f"mlp.layers.{key}": value for key, value in model.head.state_dict().items()},
    }


@torch.no_grad()
def caption_accuracy(score: Callable, seed: int) -> float:
    """How often a new picture's own caption scores above one with a mistake; score(x, captions) [B]."""
    images, captions, drawn, _ = world.render_many(500, seed)
    draw = np.random.default_rng(seed)
    wrong = [any_wording(mistaken(a, draw), draw) for a in drawn]
    x = pixels(images)
    return round((score(x, captions) > score(x, wrong)).float().mean().item(), 3)


def train_image_reward(config: Config, hub: Hub) -> dict:
    standin = config.scale_entry.standin
    fit, seed, scorer = standin.image_reward, standin.seed + 90, scorer_of(config, "image_reward")
    torch.manual_seed(seed)
    rng, draw = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    folder = hub.root / IMAGE_REWARD
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_bert(hub.root / BERT)
    write_med_config(folder / "med_config.json", len(tokenizer))
    model = Reward(scorer, tokenizer, folder / "med_config.json")
    images, _, drawn, hidden = world.render_many(standin.num_images, seed)
    images, hidden = pixels(images), torch.from_numpy((hidden - hidden.mean(0)) / hidden.std(0))
    train_vision(model, fit.sees, drawn, images, hidden, rng)
    train_text(model, fit.reads, drawn, images, rng, draw)
    rows = unpack(list(pairs(standin.num_pairs, seed)))
    held = int(HELD_OUT * standin.num_pairs)
    train_ranking(model, fit, [part[held:] for part in rows], rng, draw)
    model.eval()
    first, second, captions, label = (part[:held] for part in rows)
    with torch.no_grad():
        rewards = torch.stack([model(model.see(x), captions) for x in (first, second)], 1)
    normalise(model, rewards, scorer.MEAN, scorer.STD)
    torch.save(published_state(model, scorer), folder / "ImageReward.pt")
    return {
        "held_out_agreement": agreement(rewards, label),
        "caption_accuracy": caption_accuracy(lambda x, c: model(model.see(x), c), seed + 1),
    }


def train_hps(config: Config, hub: Hub, file: str, clean: bool, seed: int) -> dict:
    """`clean`: without pairs on which people were undecided."""
    standin = config.scale_entry.standin
    rows = [row for row in pairs(standin.num_pairs, seed) if not clean or row["label_0"] != 0.5]
    model, tokenizer, agreed = tune_on_pairs(file, standin.hps, rows, seed, hub)
    path = hub.root / HPS / file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(scorer_of(config, "hps_v2").published(model), path)

    def score(x: Tensor, captions: list[str]) -> Tensor:
        image, text = features(model, tokenizer, x, captions)
        return (image * text).sum(-1)

    return {"held_out_agreement": agreed, "caption_accuracy": caption_accuracy(score, seed + 1)}


def train(config: Config, hub: Hub) -> dict:
    transformers.utils.logging.disable_progress_bar()
    seed = config.scale_entry.standin.seed
    found = {
        "image_reward": train_image_reward(config, hub),
        "hps_v2": train_hps(config, hub, "HPS_v2_compressed.pt", clean=False, seed=seed + 100),
        "hps_v21": train_hps(config, hub, "HPS_v2.1_compressed.pt", clean=True, seed=seed + 110),
    }
    log.info("%s", found)
    return {"quality": found}


if __name__ == "__main__":
    job("rewards", train)
