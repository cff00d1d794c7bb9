"""The stand-in data sets: preference pairs and prompt lists in the real files' formats.

People of this world look at two pictures for a caption and pick by the oracle's taste, with the
Bradley-Terry noise of human labels; near-equal pairs are ties.
"""

import dataclasses
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFilter

from pso.data import Prompt, prompts_of, write_caption_json, write_caption_parquet, write_pair_shards, write_parti_tsv
from pso.entries import Config
from pso.hub import Hub
from pso.miniature import oracle, world
from pso.miniature.common import PARTI, PICKAPIC_PAIRS, PICKAPIC_PROMPTS, PROMPTS_4K, job

WRONG = 0.5  # share of pictures with one attribute that the caption does not ask for
SOFT = 0.3  # share of pictures that came out soft,
SOFTEST = 1.0  # ... by up to so many px, which costs as much utility
TEMPERATURE = 1 / 6  # of the Bradley-Terry label
TIE = 0.12  # a smaller difference in utility is called a tie
OPTIONS = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "background": tuple(world.BACKGROUNDS),
    "position": tuple(world.POSITIONS),
}


def mistaken(wanted: world.Attributes, rng: np.random.Generator) -> world.Attributes:
    """One attribute is another."""
    name = rng.choice(list(OPTIONS))
    others = [o for o in OPTIONS[name] if o != getattr(wanted, name)]
    return dataclasses.replace(wanted, **{name: str(rng.choice(others))})


def picture(wanted: world.Attributes, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A picture made for a caption, not always right or sharp, and its true utility."""
    shown = mistaken(wanted, rng) if rng.random() < WRONG else wanted
    image, hidden = world.render(shown, rng)
    size = (hidden["size"] - np.mean(world.SIZES)) / oracle.SIZE_SCALE
    soft = rng.uniform(0.0, SOFTEST) if rng.random() < SOFT else 0.0
    if soft:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(soft)))
    return image, oracle.ALIGNMENT_WEIGHT * (shown == wanted) + hidden["glow"] + size - soft


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def pairs(num_pairs: int, seed: int) -> Iterator[dict]:
    """Rows of the Pick-a-Pic schema."""
    rng, attributes = np.random.default_rng(seed), world.split("training")
    for number in range(num_pairs):
        wanted = attributes[rng.integers(len(attributes))]
        (first, u0), (second, u1) = picture(wanted, rng), picture(wanted, rng)
        preferred = rng.random() < 1 / (1 + np.exp(-(u0 - u1) / TEMPERATURE))
        label = 0.5 if abs(u0 - u1) < TIE else float(preferred)
        yield {
            "caption": wanted.caption(int(rng.integers(len(world.TEMPLATES)))),
            "jpg_0": png(first),
            "jpg_1": png(second),
            "label_0": label,
            "label_1": 1 - label,
            "ranking_id": number,
        }


def captions(split: str, count: int) -> list[Prompt]:
    """`count` captions of a split, spread over its attributes; each picture is asked for in one wording only.

    For training prompts all wordings count; two wordings of one picture are no two independent prompts of a test.
    """
    attributes, templates = world.split(split), range(len(world.TEMPLATES))
    if split == "training":
        every = [a.caption(t) for t in templates for a in attributes]
    else:
        every = [a.caption(templates[i % len(templates)]) for i, a in enumerate(attributes)]
    return prompts_of([every[i * len(every) // count] for i in range(min(count, len(every)))])


def make(config: Config, hub: Hub) -> dict:
    standin = config.scale_entry.standin
    write_pair_shards(hub.root / PICKAPIC_PAIRS, pairs(standin.num_pairs, standin.seed + 30), num_shards=2)
    counts = standin.num_prompts
    splits = {"training_prompts": "training", "pickapic_validation": "validation"}
    sets = {name: captions(splits.get(name, name), count) for name, count in counts.items()}
    for split in ("test", "validation"):
        path = hub.root / PICKAPIC_PROMPTS / "data" / f"{split}_unique-00000-of-00001.parquet"
        write_caption_parquet(path, sets[f"pickapic_{split}"])
    parti = [dataclasses.replace(p, category=_category(p), challenge="Basic") for p in sets["parti_prompts"]]
    write_parti_tsv(hub.root / PARTI[0] / PARTI[1], parti)
    write_caption_json(hub.root / PROMPTS_4K[0] / PROMPTS_4K[1], sets["training_prompts"])
    return {"prompts": {name: len(prompts) for name, prompts in sets.items()}}


def _category(prompt: Prompt) -> str:
    return world.OF_CAPTION[prompt.text].shape.capitalize()


if __name__ == "__main__":
    job("data", make)
