"""Text conditions of prompts, made once: of evaluation sets, prompt sets that runs train on, subjects' prompts, and the
empty caption. What belongs to pairs lies with their latents (pso/caches.py).

    python -m pso.texts --model sdxl_dmd2

They depend on the text encoders of the model's base and on nothing else, so all models of one base share a file, and
every table asked for adds to it. Each text goes through the encoders alone: its bits then depend on no other text, not
on which tables were asked for and not on when a job was killed. It is done once in a campaign, for some thousand texts.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from pso import weights
from pso.caches import KeptConditioning, keep, load_prompt_set, read_cache
from pso.config import ConfigError, add_arguments, from_arguments
from pso.data import text_id
from pso.dreambooth import load_subject
from pso.entries import Config
from pso.hub import Hub, hub_dir, recorded
from pso.parts import Keeper, Parts
from pso.paths import RESULTS, texts_file
from pso.policy import Conditioning, Policy
from pso.provenance import Meter, UserError, digest, fingerprint, record, sentences
from pso.visits import text_sets

log = logging.getLogger("texts")
EMPTY = ""  # the caption that stands for a dropped one
PART = 512  # texts in one part
SOURCE = "texts"  # what the parts are called


class KeptTexts:
    """Text conditions by their texts. `inputs`: the file and those that it was made from, for run.json."""

    def __init__(self, config: Config, model: str, hub: Hub, results: Path = RESULTS):
        self.path = texts_file(config.scale, config.models[model].base, results)
        self.command = f"python -m pso.texts --model {model}"
        tensors, about, self.inputs = read_cache(self.path, self.command)
        self._check(about, config, hub)
        self.places, self.row = tensors["places"], {text: row for row, text in enumerate(about["texts"])}
        self.parts = Parts(self.path.with_suffix(""), about["parts"], self.command)

    def _check(self, about: dict, config: Config, hub: Hub) -> None:
        """They are of the text encoders and the precision of now."""
        found = [about["dtype"]]
        for entry in about["inputs"]:
            path = hub.root / entry["repo"] / entry["file"]
            found.append(path.is_file() and hub.told(entry["repo"], entry["file"], path)["sha256"])
        if found != [config.scale_entry.dtype, *(entry["sha256"] for entry in about["inputs"])]:
            raise UserError(
                f"{self.path} was made by other text encoders than those of the hub {hub.root}, or in another dtype "
                f"than {config.scale_entry.dtype}; `{self.command}` makes it anew."
            )

    def condition(self, texts: list[str], device) -> KeptConditioning:
        """Of texts in their order; rows stay in their files until they are asked for."""
        if lacking := [text for text in texts if text not in self.row]:
            raise UserError(
                f"{self.path} has no text condition of {lacking[0]!r} ({len(lacking)} of {len(texts)} prompts are not "
                f"there); `{self.command}` adds those of all tables of its settings."
            )
        places = self.places[[self.row[text] for text in texts]]
        return KeptConditioning(self.parts, places, device, self.command)

    def rows(self, texts: list[str], device) -> Conditioning:
        """Of a few texts, on the device."""
        return self.condition(texts, device).rows(torch.arange(len(texts)))


# ---- making them ----


class TextEncoders:
    """What a Policy encodes prompts with, without UNet and VAE."""

    encode_prompts = Policy.encode_prompts

    def __init__(self, hub: Hub, base: str, dtype: torch.dtype):
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()  # one line per small file says nothing
        parts = {"unet": None, "vae": None, **weights.load_text_encoders(hub, base, dtype)}
        of, folder = StableDiffusionXLPipeline.from_pretrained, hub.repo(base)
        self.pipeline = weights.from_hub(
            base, hub, lambda: of(folder, local_files_only=True, add_watermarker=False, **parts)
        )
        weights.check_tokenizers(self.pipeline)
        self.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def texts_of(config: Config, base: str, hub: Hub) -> list[str]:
    """All different texts that jobs on models of a base read, sorted."""
    found = {EMPTY}
    for name, subject in text_sets(config, base):
        entry = config.datasets[name]
        if entry.format == "dreambooth":
            one = load_subject(hub, entry, name, subject)
            found |= {*one.prompts(), one.instance_prompt}
        else:
            found |= {prompt.text for prompt in load_prompt_set(hub, entry, name)}
    return sorted(found)


def encoder(encoders: TextEncoders) -> Callable[[list[str]], dict[str, Tensor]]:
    def encode(texts: list[str]) -> dict[str, Tensor]:
        found = [encoders.encode_prompts([text]) for text in texts]
        return {name: torch.cat([getattr(one, name).cpu() for one in found]) for name in ("hidden", "pooled")}

    return encode


def convert(texts: list[str], folder: Path, settings: object, encode: Callable) -> tuple[np.ndarray, dict[str, str]]:
    """Encode the texts that are not there yet. Returns places [len(texts), 2] (pso/parts.py) and the parts."""
    keeper, made_from, where = Keeper(folder), digest(settings), {}
    for number, part in keeper.found(SOURCE, made_from):
        where |= _placed(number, part.rows.tolist())
    names = [_number(text) for text in texts]
    missing = [i for i, name in enumerate(names) if name not in where]
    for start in range(0, len(missing), PART):
        some = missing[start : start + PART]
        rows = [names[i] for i in some]
        where |= _placed(keeper.write(SOURCE, made_from, np.array(rows), encode([texts[i] for i in some])), rows)
        log.info("%d of %d texts encoded", min(start + PART, len(missing)), len(missing))
    return keeper.in_order(np.array([where[name] for name in names]))


def _number(text: str) -> int:
    """What a part calls a text: 63 bits of its hash."""
    return int(text_id(text), 16) >> 1


def _placed(number: int, rows: Iterable[int]) -> dict[int, tuple[int, int]]:
    return {name: (number, row) for row, name in enumerate(rows)}


def build(config: Config, model: str, results: Path) -> None:
    base, scale = config.models[model].base, config.scale
    if not (sets := text_sets(config, base)):
        raise ConfigError(f"--model is {model!r}, but no row of {', '.join(config.tables)} shows a model of its base.")
    meter, hub, data = Meter(), Hub(hub_dir(scale, results)), Hub(hub_dir(scale, results))
    texts, dtype = texts_of(config, base, data), config.scale_entry.dtype
    encoders = TextEncoders(hub, base, getattr(torch, dtype))
    path, inputs = texts_file(scale, base, results), hub.inputs()
    made_from = {"code": fingerprint("pso.texts"), "dtype": dtype, "weights": inputs}
    places, parts = convert(texts, path.with_suffix(""), made_from, encoder(encoders))
    names = sorted({name for name, _ in sets})
    settings = {"scale": scale, "base": base, "datasets": {name: recorded(config.datasets[name]) for name in names}}
    # prompt files are no inputs of whoever reads this: it names its texts itself, and another set adds to the file
    about = {"texts": texts, "parts": parts, "dtype": dtype, "read": data.inputs()}
    tensors = {"places": torch.from_numpy(places).long()}
    keep(path, tensors, about, made_from, record("texts", settings, inputs, meter))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--model", required=True, help="any model of the base")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with sentences("texts"):
        config = from_arguments(args)
        if args.model not in config.models:
            raise ConfigError(f"--model is {args.model!r}; expected one of {', '.join(config.models)}.")
        build(config, args.model, args.results)


if __name__ == "__main__":
    main()
