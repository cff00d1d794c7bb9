"""Images of every row of one model, in one process: the base is loaded once, the LoRAs are swapped.

    python -m eval.generate --model sdxl_dmd2 [--task preference] [--untuned]

Images are ordered by prompt id and seed and cut into blocks of `eval_batch`; a shard is a run of
blocks. A block's pixels depend on nothing outside it (keyed noise, kept text conditions (pso/texts.py), the last
one padded), so images are byte-identical under any sharding, order and restart. Pictures become PNGs and shards in a
thread of their own while the next block is sampled. Shards that are
there and were made from the same inputs are kept. images.json, written last, lists them all; with --untuned only
the rows in which nothing was trained are made and listed, in untuned_images.json.
"""

import argparse
import io
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pso.background import Behind
from pso.caches import load_prompt_set
from pso.config import ConfigError, add_arguments, from_arguments
from pso.data import Prompt, prompts_of
from pso.dreambooth import load_subject
from pso.entries import Config, DatasetEntry
from pso.hub import Hub, hub_dir
from pso.locks import locked
from pso.models import chain_for, load_policy
from pso.paths import RESULTS, finished_state, manifest, model_dir, root_of, scale_dir
from pso.policy import Conditioning, Policy, to_images
from pso.provenance import Meter, UserError, atomic, digest, fingerprint, record, sentences, sha256_of, write_json
from pso.rollout import rollout
from pso.runs import Job, jobs_asked_for
from pso.texts import KeptTexts

log = logging.getLogger("generate")
METADATA_KEY = b"pso_bench"
LOCK = ".generate.lock"  # in a model's folder
SHARD_BLOCKS = 8
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("image_seed", pa.int64()),
        ("png", pa.binary()),
    ]
)


Conditions = Callable[[list[str], torch.device], Conditioning]  # texts -> their conditions on a device


@dataclass(frozen=True, order=True)
class Wanted:
    """One image to make."""

    prompt_id: str
    image_seed: int
    prompt: str

    @property
    def key(self) -> tuple:
        return ("eval", self.image_seed, self.prompt_id)


def eval_prompts(hub: Hub, entry: DatasetEntry, name: str, subject: str | None) -> list[Prompt]:
    """The prompts of an eval set, or of one subject of it."""
    if entry.format != "dreambooth":
        return load_prompt_set(hub, entry, name)
    return prompts_of(load_subject(hub, entry, name, subject).prompts(), f"the prompts of {subject}")


def wanted(prompts: list[Prompt], num_seeds: int, eval_seed: int) -> list[Wanted]:
    """All images of an eval set in their one order, whatever the order of the prompt file."""
    return sorted(Wanted(p.id, eval_seed + k, p.text) for p in prompts for k in range(num_seeds))


def blocks(images: list[Wanted], size: int) -> list[list[Wanted]]:
    return [images[i : i + size] for i in range(0, len(images), size)]


def sample_block(policy: Policy, chain, block: list[Wanted], size: int, conditions: Conditions) -> list[Image.Image]:
    """One network batch of fixed shape."""
    padded = [*block, *[block[-1]] * (size - len(block))]
    condition = conditions([w.prompt for w in padded], policy.device)
    latents = rollout(policy, chain, condition, [w.key for w in padded]).x0
    return to_images(policy.decode(latents)[: len(block)])


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Shard:
    """A shard on its way to `path`: the whole of it or nothing."""

    def __init__(self, path: Path, source: dict):
        self.path, self.source, self.rows = path, source, []

    def add(self, block: list[Wanted], images: list[Image.Image]) -> None:
        self.rows += [
            {"image_id": f"{w.prompt_id}-{w.image_seed}", "prompt_id": w.prompt_id, "prompt": w.prompt,
             "image_seed": w.image_seed, "png": png(image)}
            for w, image in zip(block, images, strict=True)
        ]  # fmt: skip

    def write(self) -> str:
        """Its sha256."""
        table = pa.Table.from_pylist(self.rows, SCHEMA.with_metadata({METADATA_KEY: json.dumps(self.source)}))
        with atomic(self.path) as part:
            pq.write_table(table, part)
        return sha256_of(self.path)


def is_current(path: Path, source: dict) -> bool:
    """Whether a shard is there, whole, and made from these inputs."""
    if not path.exists():
        return False
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return False
    return json.loads(metadata.get(METADATA_KEY, b"{}")) == source


class Generator:
    """A loaded model that makes the images of one row after the other."""

    def __init__(self, config: Config, model: str, results: Path):
        self.config, self.model, self.results = config, model, results
        self.hub = Hub(hub_dir(config.scale, results))
        self.entry = config.models[model]
        dtype, speed = getattr(torch, config.scale_entry.dtype), config.scale_entry.speed
        self.policy = load_policy(self.entry, self.hub, dtype, name=model, speed=speed)
        self.inputs = self.hub.inputs()
        self.texts = KeptTexts(config, model, self.hub, results)
        self.prompts: dict[tuple[str, str | None], list[Prompt]] = {}
        self.made = self.kept = 0

    def eval_set(self, name: str, subject: str | None = None) -> list[Prompt]:
        if (name, subject) not in self.prompts:
            self.prompts[name, subject] = eval_prompts(self.hub, self.config.datasets[name], name, subject)
        return self.prompts[name, subject]

    def source(self, job: Job, shard: list[list[Wanted]]) -> dict:
        """Everything that decides a shard's pixels, except the machine."""
        lora = job.lora(self.config.scale, self.results)
        if lora is not None and not lora.exists():
            raise UserError(
                f"{lora} is missing; `python -m pso.tune --model {job.model} --method {job.method}` makes it."
            )
        return {
            **asdict(job),
            "scale": self.config.scale,
            "settings": digest(self.entry.model_dump()),
            "weights": digest(self.inputs),
            "lora": None if lora is None else sha256_of(lora),
            "code": fingerprint("eval.generate"),
            "batch": self.config.scale_entry.eval_batch,
            **self.config.scale_entry.model_dump(include={"dtype", "speed"}),
            "images": digest([asdict(w) for block in shard for w in block]),
        }

    def run(self, job: Job) -> list[dict]:
        """Make what is missing of one row on one eval set; its shards for the manifest."""
        size = self.config.scale_entry.eval_batch
        entry = self.config.datasets[job.eval_set]
        images = wanted(self.eval_set(job.eval_set, job.subject), entry.num_seeds, self.config.scale_entry.eval_seed)
        todo = blocks(images, size)
        shards = [todo[i : i + SHARD_BLOCKS] for i in range(0, len(todo), SHARD_BLOCKS)]
        folder = job.images(self.config.scale, self.results)
        digests: dict[Path, Future | None] = {}
        with Behind() as behind:
            for k, shard in enumerate(shards):
                path, source = folder / f"shard{k}.parquet", self.source(job, shard)
                kept = is_current(path, source)
                digests[path] = None if kept else self._make(job, Shard(path, source), shard, behind)
                count = sum(map(len, shard))
                self.kept, self.made = self.kept + kept * count, self.made + (not kept) * count
        for old in folder.glob("shard*.parquet"):
            if int(old.stem.removeprefix("shard")) >= len(shards):
                old.unlink()
        root = scale_dir(self.config.scale, self.results)
        return [
            {
                "file": str(path.relative_to(root)),
                "images": sum(map(len, shard)),
                "sha256": sha256_of(path) if written is None else written.result(),
            }
            for shard, (path, written) in zip(shards, digests.items(), strict=True)
        ]

    def _make(self, job: Job, made: Shard, shard: list[list[Wanted]], behind: Behind) -> Future:
        """Sample a shard's blocks; what becomes of them, its sha256 in the end, is done behind."""
        size = self.config.scale_entry.eval_batch
        self._load(job)
        chain = chain_for(job.model, self.entry, job.steps)
        with self.policy.sampling():
            for block in shard:
                behind(made.add, block, sample_block(self.policy, chain, block, size, self.texts.rows))
        return behind(made.write)

    def _load(self, job: Job) -> None:
        if getattr(self, "loaded", None) == job.lora(self.config.scale, self.results):
            return
        self.loaded = job.lora(self.config.scale, self.results)
        self.policy.unload_lora()
        if self.loaded is not None:
            self.policy.load_lora(self.loaded.parent)


def generate(config: Config, model: str, results: Path, task: str | None = None, untuned: bool = False) -> None:
    wanted_jobs = jobs_asked_for(config, model, task, untuned)
    folders = sorted({model_dir(config.scale, root_of(job.task), model, results) for job in wanted_jobs})
    with locked(*(folder / LOCK for folder in folders)):
        generate_jobs(config, model, results, wanted_jobs, untuned)


def generate_jobs(config: Config, model: str, results: Path, wanted_jobs: list[Job], untuned: bool) -> None:
    meter, found = Meter(), {}
    generator = Generator(config, model, results)
    began = time.monotonic()
    for number, job in enumerate(wanted_jobs, 1):
        shards = generator.run(job)
        shutil.rmtree(finished_state(job.folder(config.scale, results)), ignore_errors=True)
        found.setdefault(root_of(job.task), []).append({**asdict(job), "shards": shards})
        left = (time.monotonic() - began) / number * (len(wanted_jobs) - number)
        log.info("%d/%d %s %s seed%d  left %d:%02d", number, len(wanted_jobs), job.method, job.eval_set, job.seed,
                 *divmod(math.ceil(left), 60))  # fmt: skip
    truncated: dict[str, int] = {}
    for (name, _), prompts in generator.prompts.items():
        texts = [p.text for p in prompts]
        truncated[name] = truncated.get(name, 0) + generator.policy.truncated_prompts(texts)
    meter.counts = {"unet_forwards": generator.policy.unet_forwards, "images": generator.made, "kept": generator.kept}
    settings = {"scale": config.scale, "model": {model: config.models[model].model_dump()}}
    inputs = [*generator.inputs, *(entry for entry in generator.texts.inputs if entry not in generator.inputs)]
    for task, listed in found.items():
        write_json(
            manifest(model_dir(config.scale, task, model, results), "images", untuned),
            record("generate", settings, inputs, meter, images=listed, truncated_prompts=truncated),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", help="one task alone, with all its subjects; default: all tasks")
    parser.add_argument("--untuned", action="store_true", help="only the rows in which nothing was trained")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with sentences("generate"):
        config = from_arguments(args)
        if args.model not in config.models:
            raise ConfigError(f"--model is {args.model!r}; expected one of {', '.join(config.models)}.")
        generate(config, args.model, args.results, args.task, args.untuned)


if __name__ == "__main__":
    main()
