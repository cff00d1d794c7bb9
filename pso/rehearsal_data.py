"""Prompts, pairs and pictures that mean nothing, in the published data sets' formats."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pso.data import Prompt, prompts_of, write_caption_json, write_caption_parquet, write_pair_shards, write_parti_tsv
from pso.dreambooth import HEADINGS, PROMPT_FILE
from pso.entries import Config, RandomWeights
from pso.imagefolder import write_imagefolder
from pso.provenance import atomic

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
THINGS = ("cat", "horse", "robot", "castle", "glass", "tree", "boy", "car")
PLACES = ("by the sea", "on a table", "in the snow", "at night", "under a dark sky")
SIDE = 64  # px
NUM_SHARDS = 2
NUM_PICTURES = 4  # of each subject
TIE_EVERY = 8  # pairs


def text(number: int) -> str:
    colour, thing, place = (words[number % len(words)] for words in (COLOURS, THINGS, PLACES))
    return f"a {colour} {thing} {place}, number {number}"


def prompts(first: int, count: int) -> list[Prompt]:
    return prompts_of(text(first + i) for i in range(count))


def picture(key: int, seed: int) -> bytes:
    """Coarse noise as JPEG."""
    grains = np.random.default_rng((seed, key)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(grains).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def pairs(asked: RandomWeights) -> Iterator[dict]:
    """Rows of the Pick-a-Pic schema, a few of them ties."""
    for number in range(asked.num_pairs):
        label = 0.5 if number % TIE_EVERY == TIE_EVERY - 1 else float(number % 2)
        yield {
            "caption": text(number),
            "jpg_0": picture(2 * number, asked.seed),
            "jpg_1": picture(2 * number + 1, asked.seed),
            "label_0": label,
            "label_1": 1 - label,
            "ranking_id": number,
        }


def subjects(config: Config) -> list[str]:
    """Those of every table."""
    return sorted({name for table in config.table_entries.values() for name in table.subjects})


def prompt_file(names: list[str], count: int) -> str:
    """prompts_and_classes.txt with `count` prompts for things and as many for animals."""
    classes = [f"{name},{name.split('_')[0].rstrip('0123456789')}" for name in names]
    lines = [f"'a {{0}} {{1}} {PLACES[i % len(PLACES)]}, number {i}'" for i in range(count)]
    lines = [f"{line}.format(unique_token, class_token)," for line in lines]
    lists = [line for heading in HEADINGS for line in (heading, "", "prompt_list = [", *lines, "]", "")]
    return "\n".join(["Classes", "", "subject_name,class", *classes, "", "Prompts", "", *lists])


# ---- one repository each: (config, what is asked for, folder) ----


def write_pairs(config: Config, asked: RandomWeights, folder: Path) -> None:
    write_pair_shards(folder, pairs(asked), NUM_SHARDS)


def write_test_prompts(config: Config, asked: RandomWeights, folder: Path) -> None:
    for number, split in enumerate(("test", "validation"), 1):
        path = folder / "data" / f"{split}_unique-00000-of-00001.parquet"
        write_caption_parquet(path, prompts(number * 1_000_000, asked.num_prompts))


def write_training_prompts(config: Config, asked: RandomWeights, folder: Path) -> None:
    path = folder / "spo_training_and_inference/assets/prompts/4k_training_prompts.json"
    write_caption_json(path, prompts(3_000_000, asked.num_pairs))


def write_parti(config: Config, asked: RandomWeights, folder: Path) -> None:
    found = [Prompt(p.id, p.text, "Animals", "Basic") for p in prompts(4_000_000, asked.num_prompts)]
    write_parti_tsv(folder / "PartiPrompts.tsv", found)


def write_subjects(config: Config, asked: RandomWeights, folder: Path) -> None:
    names = subjects(config)
    with atomic(folder / "dataset" / PROMPT_FILE) as part:
        part.write_text(prompt_file(names, asked.num_prompts))
    for number, name in enumerate(names):
        for k in range(NUM_PICTURES):
            with atomic(folder / "dataset" / name / f"{k:02d}.jpg") as part:
                part.write_bytes(picture(5_000_000 + NUM_PICTURES * number + k, asked.seed))


def write_style(config: Config, asked: RandomWeights, folder: Path) -> None:
    found = [(f"{i:04d}.jpg", text(i), picture(6_000_000 + i, asked.seed)) for i in range(asked.num_pairs)]
    write_imagefolder(folder / "train", found)


DATA: dict[str, Callable[[Config, RandomWeights, Path], None]] = {
    "yuvalkirstain/pickapic_v2": write_pairs,
    "yuvalkirstain/pickapic_v1_no_images": write_test_prompts,
    "yuvalkirstain/pickapic_v2_no_images": write_test_prompts,
    "RockeyCoss/SPO": write_training_prompts,
    "google-research/parti": write_parti,
    "google/dreambooth": write_subjects,
    "pso-bench/style-world": write_style,
}
