"""What a campaign will cost before it starts: calls, FLOPs, GPU-hours and disk, from the configuration alone.

    python -m pso.estimate table1 table2 --set '{"scale": "paper"}'

Calls are those of pso/work.py; FLOPs of a call are counted by torch on networks without weights (pso/flops.py), or
taken from the kept figures of `python -m pso.bench count`, if they were counted with the same libraries.
"""

import argparse
import importlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pso import campaign
from pso.campaign import Work
from pso.checks import STOCHASTIC, known
from pso.config import add_arguments, from_arguments
from pso.entries import Config
from pso.paths import RESULTS, root_of, scale_dir
from pso.provenance import ROOT, UserError, atomic, sentences, versions, write_json
from pso.work import KEPT, Call, Calls

PEAK = 788e12  # FLOP/s of one H200 in bf16: measured on products of 8192 x 8192 random matrices, by others
STATED_MFU = 0.5  # compiled training of this size reaches 0.4 to 0.55; no run of ours stands behind it
FIGURES = ROOT / "results" / "benchmarks" / "count.json"
LIBRARIES = ("torch", "diffusers", "transformers", "peft")  # decide what is counted
PNG_BYTES = 1.6  # per px of a generated picture; stated
LORA_PARAMETERS = 1_451_520  # per rank, on to_q, to_k, to_v and to_out.0
LATENT_BYTES = 2 * 2 * 4 / 64 * 2  # per px of a pair: two sides, mean and std, 4 channels at an eighth of the side
TEXT_BYTES = (77 * 2048 + 1280) * 2  # of a prompt, 16 bit
RULES = ("fetch", "latents", "texts", "embeddings", "preference_model", "tune", "generate", "score", "tables")
GUIDED = "Calls for one sample each. Plain: pre, and untuned models. Guidance calls twice."


@dataclass(frozen=True)
class Rate:
    """How fast a GPU is taken to be: `mfu` of PEAK, and where that figure comes from."""

    mfu: float
    source: str

    def hours(self, flops: float) -> float:
        return flops / (self.mfu * PEAK) / 3600


def rate(mfu: float | None = None, folder: Path = RESULTS / "benchmarks") -> Rate:
    """The utilisation asked for, else a measured one that a benchmark keeps as `mfu`, else the stated one."""
    if mfu is not None:
        if not 0 < mfu <= 1:
            raise UserError(f"--mfu is {mfu}; expected a share of the GPU's peak, above 0 and at most 1, such as 0.5.")
        return Rate(mfu, "as asked for")
    for path in sorted(Path(folder).glob("*.json")):
        measured = json.loads(path.read_text()).get("mfu")
        if isinstance(measured, float) and 0 < measured <= 1:
            return Rate(measured, f"measured, {path.name}")
    return Rate(STATED_MFU, "stated, not measured")


# ---- FLOPs ----


def kept_name(call: Call) -> str:
    """What the kept figures call it."""
    named = {"text": "text encoders, a prompt", "image_reward": "ImageReward", "dino": "DINO"}
    if call.network in ("unet", "theta", "backward"):
        lora = "" if call.network == "unet" else f" with LoRA of rank {call.rank}"
        return f"UNet {call.side} px{lora}, {'backward' if call.network == 'backward' else 'forward'}"
    if call.network in ("decode", "encode"):
        return f"VAE {call.side} px, {call.network}"
    if call.network.endswith("_text"):
        return f"{call.network.removesuffix('_text')}, prompt"
    return named.get(call.network, f"{call.network}, picture")


def kept_flops(path: Path = FIGURES) -> dict[str, int]:
    """The kept figures; none where they were counted with other libraries. Where these are not installed, nothing
    else can be counted."""
    try:
        told, here = json.loads(Path(path).read_text()), versions()
        same = all(_public(told["versions"][name]) == _public(here[name]) for name in LIBRARIES if name in here)
        return told["flops"] if same else {}
    except (OSError, ValueError, KeyError):
        return {}


def _public(version: str) -> str:
    """2.13.0 of 2.13.0+cpu."""
    return version.partition("+")[0]


class Flops:
    """FLOPs of calls, each counted at most once."""

    def __init__(self, path: Path = FIGURES):
        self.kept, self.counted = kept_flops(path), {}

    def of(self, call: Call) -> int:
        name = kept_name(call)
        if name in self.kept:
            return self.kept[name]
        if call not in self.counted:  # torch is loaded only where it has to count
            self.counted[call] = importlib.import_module("pso.flops").of(*call)
        return self.counted[call]

    def total(self, calls: Calls) -> int:
        return sum(count * self.of(call) for call, count in calls.items())


# ---- a line of the estimate ----

COLUMNS = {
    "pre": ("unet",),
    "theta": ("theta",),
    "backward": ("backward",),
    "decode": ("decode",),
    "encode": ("encode",),
    "prompts": ("text",),
    "scored": ("clip_h14", "clip_l14", "clip_b32", "image_reward", "dino"),
}


def counts(calls: Calls) -> dict[str, int]:
    """Calls by kind, without sizes and ranks."""
    return {kind: sum(n for call, n in calls.items() if call.network in names) for kind, names in COLUMNS.items()}


def judged(calls: Calls) -> dict[str, int]:
    """Pictures scored, by network."""
    found = {name: sum(n for call, n in calls.items() if call.network == name) for name in COLUMNS["scored"]}
    return {name: count for name, count in found.items() if count}


def disk_gb(item: Work) -> dict[str, float]:
    """What a job leaves on disk, by kind, in 1e9 bytes."""
    found = {
        "weights and data": item.gb,
        "latents": item.samples * item.side**2 * LATENT_BYTES / 1e9,
        "prompt embeddings": item.prompts * TEXT_BYTES / 1e9,
        "images": item.images * item.side**2 * PNG_BYTES / 1e9,
        "LoRAs": item.lora_rank * LORA_PARAMETERS * 4 / 1e9,
    }
    return {name: gb for name, gb in found.items() if gb}


def all_calls(items: list[Work], part: str | None = None) -> Calls:
    found: Calls = Counter()
    for item in items:
        for name, calls in item.parts.items():
            if part in (None, name):
                found.update(calls)
    return found


def line(items: list[Work], flops: Flops, speed: Rate, part: str | None = None) -> dict[str, Any]:
    """The sums of some jobs, or of one part of them."""
    calls = all_calls(items, part)
    work_flops, disk = flops.total(calls), Counter()
    for item in items if part is None else ():
        disk.update(disk_gb(item))
    return {
        "jobs": len(items),
        **counts(calls),
        "scored_by": judged(calls),
        "images": sum(item.images for item in items) if part is None else 0,
        "flops": work_flops,
        "gpu_hours": speed.hours(work_flops),
        "disk_gb": dict(disk),
    }


# ---- the estimate ----


def restricted(config: Config, tables: list[str] | None, extra: bool = True) -> Config:
    """The config with these tables alone; without `extra` as the paper prints them."""
    names = list(config.tables if tables is None else tables)
    for name in names:
        known("the table asked for", name, config.table_entries)
    entries = config.table_entries
    if not extra:
        entries = {name: table.model_copy(update={"extra_rows": []}) for name, table in entries.items()}
    return config.model_copy(update={"tables": names, "table_entries": entries})


def estimate(
    config: Config, tables: list[str] | None = None, mfu: float | None = None, kept: float = KEPT
) -> dict[str, Any]:
    """Sums by rule, part, table and in all, and every job. Tables share jobs, so theirs may add up to more."""
    if not 0 < kept <= 1:
        raise UserError(f"--kept is {kept}; expected the share of SPO's forks that is kept, above 0 and at most 1.")
    config = restricted(config, tables)
    refuse_stand_in(config)
    flops, speed, items = Flops(), rate(mfu), campaign.works(config, kept)
    by_rule = {rule: [item for item in items if item.rule == rule] for rule in RULES}
    parts = list(dict.fromkeys(part for item in by_rule["tune"] for part in item.parts))
    return {
        "scale": config.scale,
        "tables_asked_for": config.tables,
        "seeds": config.seeds,
        "mfu": speed.mfu,
        "mfu_source": speed.source,
        "peak_flops": PEAK,
        "spo_forks_kept": kept,
        "rules": {rule: line(found, flops, speed) for rule, found in by_rule.items()},
        "tune": {part: line([i for i in by_rule["tune"] if part in i.parts], flops, speed, part) for part in parts},
        "tables": {
            name: line(campaign.works(restricted(config, [name]), kept), flops, speed) for name in config.tables
        },
        "total": line(items, flops, speed),
        "drivers": drivers(config, items, flops, speed, kept),
        "unknown_judges": campaign.unknown_judges(config),
        "jobs": [{"rule": i.rule, "job": i.name, **line([i], flops, speed), "uncounted": i.uncounted} for i in items],
    }


def refuse_stand_in(config: Config) -> None:
    """Networks of other sizes than the published ones have other FLOPs."""
    made = config.scale_entry
    if made.standin is not None or (made.random is not None and made.random.sizes != "published"):
        raise UserError(
            f"config.scale is {config.scale!r}, whose networks are not of the published sizes that are counted here; "
            "ask for the cost of the scale paper or reduced, or see `snakemake spent` for what this one took."
        )


def drivers(config: Config, items: list[Work], flops: Flops, speed: Rate, kept: float) -> dict[str, float]:
    """GPU-hours of what the paper's own floors leave out, or of what another reading would save or add."""
    hours = lambda calls: speed.hours(flops.total(calls))  # noqa: E731
    tunes = [item for item in items if item.rule == "tune"]
    summed = [item for item in tunes if item.one_transition is not None]
    saved = sum(hours(item.parts["training"]) - hours(item.one_transition) for item in summed)
    as_printed = campaign.works(restricted(config, None, False), kept)
    found = {"extra_rows": hours(all_calls(items)) - hours(all_calls(as_printed)), "sum_over_transitions": saved}
    found["probes"] = hours(all_calls(tunes, "probes"))
    found["second_pass"] = hours(sum((item.second_pass for item in tunes), Counter()))
    found["all_forks_kept"] = hours(all_calls(campaign.works(config, 1.0))) - hours(all_calls(items))
    anew = sum((item.without_cache for item in items), Counter())
    kept_once = all_calls([item for item in items if item.rule in ("latents", "texts")])
    encoded = {call: n for call, n in kept_once.items() if call.network in ("encode", "text")}
    found["without_caches"] = hours(anew) - hours(encoded)
    teacher = [i for i in tunes if config.models[i.name.split()[1]].sampler not in STOCHASTIC]
    found["teacher_tuned"] = hours(all_calls(teacher))
    return found


# ---- for people ----

HEAD = {
    "jobs": "jobs", "pre": "UNet, plain", "theta": "UNet with LoRA", "backward": "backward",
    "decode": "VAE decodes", "encode": "VAE encodes", "prompts": "prompts encoded", "scored": "pictures scored",
    "images": "images", "flops": "EFLOP", "gpu_hours": "GPU-hours", "disk_gb": "disk GB",
}  # fmt: skip


def _cell(key: str, value: Any) -> str:
    if key == "disk_gb":
        value = sum(value.values())
        return f"{value:,.1f}" if value else ""
    if key == "flops":
        return f"{value / 1e18:,.3f}" if value else ""
    if key == "gpu_hours":
        return f"{value:,.2f}" if value else ""
    return f"{value:,}" if value else ""


def _rows(named: dict[str, dict], first: str, keys: list[str] | None = None) -> str:
    keys = keys or list(HEAD)
    lines = [f"| {first} | " + " | ".join(HEAD[k] for k in keys) + " |", "|:---" + "|---:" * len(keys) + "|"]
    lines += [f"| {name} | " + " | ".join(_cell(k, told[k]) for k in keys) + " |" for name, told in named.items()]
    return "\n".join(lines)


def _groups(told: dict) -> dict[str, dict]:
    """Tuning jobs, those of the subjects of one task together."""
    found: dict[str, dict] = {}
    for job in told["jobs"]:
        if job["rule"] != "tune":
            continue
        task, model, method, _ = job["job"].split()
        name = f"{root_of(task)} {model} {method}"
        if name not in found:
            found[name] = {key: (Counter(job[key]) if key == "disk_gb" else job[key]) for key in HEAD}
            continue
        for key in HEAD:
            found[name][key] = found[name][key] + (Counter(job[key]) if key == "disk_gb" else job[key])
    return dict(sorted(found.items(), key=lambda item: -item[1]["gpu_hours"]))


def as_text(told: dict) -> str:
    scale, asked = told["scale"], ", ".join(told["tables_asked_for"])
    rules = {rule: row for rule, row in told["rules"].items() if row["jobs"]}
    total, alone = told["total"], told["tables"]
    disk, judges = total["disk_gb"], total["scored_by"]
    parts = [
        f"# What {scale} will cost: {asked}",
        f"**{total['gpu_hours']:,.1f} GPU-hours** at a model-FLOP utilisation of {told['mfu']:g} "
        f"({told['mfu_source']}) of {PEAK / 1e12:g} TFLOP/s, an H200's; **{sum(disk.values()):,.0f} GB** of disk. "
        f"Training seeds: {len(told['seeds'])}. Nothing was run for this: it is counted from the configuration.",
        "## By rule",
        _rows({**rules, "**in all**": total}, "rule") + f"\n\n{GUIDED}",
        "On disk: " + ", ".join(f"{name} {gb:,.1f} GB" for name, gb in disk.items()) + ".",
        "Pictures scored: " + (", ".join(f"{name} {n:,}" for name, n in judges.items()) or "none") + ".",
        "## Tuning by part",
        _rows(told["tune"], "part", [k for k in HEAD if k not in ("images", "disk_gb")]),
        "## By table",
        _rows(alone, "table alone", ["jobs", "images", "flops", "gpu_hours", "disk_gb"])
        + ("\n\nTables share jobs, so together they cost less than the sum." if len(alone) > 1 else ""),
        "## Tuning runs",
        _rows(_groups(told), "task, model, method (runs of all subjects and seeds)"),
        *_notes(told),
    ]
    return "\n\n".join(parts) + "\n"


def _notes(told: dict) -> list[str]:
    more = told["drivers"]
    drives = [
        f"rows that are not the paper's (`extra_rows`): {more['extra_rows']:,.1f} GPU-hours",
        "the sum over all transitions of a pair in Eq. 5 and 6 (`trajectory_sum`), against one drawn at random "
        f"(`sample_one`): {more['sum_over_transitions']:,.1f} GPU-hours",
        f"probes of the sampler during tuning: {more['probes']:,.2f} GPU-hours",
        f"tuning of models with a multi-step sampler: {more['teacher_tuned']:,.1f} GPU-hours",
        f"SPO, if all forks were kept instead of {told['spo_forks_kept']:g}: {more['all_forks_kept']:+,.1f} GPU-hours; "
        "the share is stated, and known only while it runs",
        "encoding pictures in every update, and prompts in every update and for every image, instead of once: "
        f"{more['without_caches']:+,.1f} GPU-hours",
    ]
    not_in_it = [
        "what too little memory for an update's rows forces (pso/memory.py): a second pass of theta, "
        f"{more['second_pass']:,.1f} GPU-hours if every update makes one, or activations formed again under gradient "
        "checkpointing, about three quarters of that",
        "loading, waiting for data, writing, fetching and table making",
        "CLIP ViT-B/32's prompts, and the few pictures of a subject: encoded for its runs, seen by DINO and CLIP",
        "optimiser and pointwise work: FLOPs are those of linear layers, convolutions and attention's products",
        "on disk: checkpoints of a run that goes on, logs, scores, and the data set where it is kept as a whole "
        "beside its repository's size",
    ]
    assumed = [
        "one utilisation for all networks: VAE and judges reach less of the peak than the UNet",
        "UNet, VAE, text encoders and judges of the published sizes; LoRAs on to_q, to_k, to_v and to_out.0",
        f"pairs of Pick-a-Pic v2 without ties: {campaign.PICKAPIC_PAIRS:,} of {campaign.PICKAPIC_PROMPTS:,} prompts; "
        "latents are made once for each model and only of the pairs that its runs visit, mean and std in 16 bit",
        "prompts are encoded once for each set of pairs and each base model, and read once by each judge",
        f"{PNG_BYTES:g} bytes for each px of a PNG; LoRAs in float32",
    ]
    unknown = [f"{job['job']}: {job['uncounted']}" for job in told["jobs"] if job["uncounted"]]
    unknown += [f"calls of {name}, whose network is not known here" for name in told["unknown_judges"]]
    sections = {"What drives it": drives, "What is not in it": [*unknown, *not_in_it], "Assumptions": assumed}
    return [f"## {title}\n\n" + "\n".join(f"- {one}" for one in lines) for title, lines in sections.items()]


def text(config: Config, tables: list[str] | None = None, mfu: float | None = None, kept: float = KEPT) -> str:
    """The estimate in Markdown."""
    return as_text(estimate(config, tables, mfu, kept))


def write(told: dict, results: Path = RESULTS) -> Path:
    """results/{scale}/estimate.md and .json; the path of the first."""
    path = scale_dir(told["scale"], results) / "estimate.md"
    with atomic(path) as part:
        part.write_text(as_text(told))
    write_json(path.with_suffix(".json"), told)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("tables", nargs="*", help="default: those of the configuration")
    parser.add_argument("--mfu", type=float, help=f"share of the GPU's peak; else a measured one or {STATED_MFU}")
    parser.add_argument("--kept", type=float, default=KEPT, help="share of SPO's forks above the threshold")
    parser.add_argument("--write", action="store_true", help="also write results/{scale}/estimate.md and .json")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    with sentences("estimate"):
        told = estimate(from_arguments(args), args.tables or None, args.mfu, args.kept)
        if args.write:
            write(told, args.results)
        print(as_text(told), end="")


if __name__ == "__main__":
    main()
