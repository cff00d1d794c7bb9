"""What a whole scale cost, stage by stage and job by job, from the records that the jobs left.

    python -m eval.cost

Writes results/{scale}/cost.md: seconds, peak memory, of a GPU too where there was one, and UNet forwards.
"""

import argparse
from pathlib import Path

import pandas as pd

from pso.config import add_arguments, from_arguments
from pso.entries import UNTUNED, Config
from pso.paths import RESULTS, manifest, model_dir, root_of, run_dir, scale_dir
from pso.provenance import UserError, atomic, read_json, sentences
from pso.runs import jobs
from pso.steps import Steps

STAGES = {"hub": "stand-in hub", "cache": "latents, texts, embeddings", "run": "tuning"}
COLUMNS = {
    "wall_s": "wall s",
    "cpu_s": "CPU s",
    "peak_rss_gib": "peak RSS GiB",
    "peak_gpu_gib": "peak GPU GiB",
    "unet_forwards": "UNet forwards",
}
GPU = "peak_gpu_gib"


def record_files(config: Config, results: Path) -> dict[str, Path]:
    """Job -> its record, of every job behind the tables asked for, in the order of the DAG; there or not."""
    root, wanted = scale_dir(config.scale, results), jobs(config)
    runs = [job.folder(config.scale, results) / "run.json" for job in wanted if job.method != UNTUNED]
    runs += [  # what stands for checkpoints of others
        run_dir(config.scale, "published", run.model, run.method, 0, results) / "run.json"
        for name, run in Steps(config).published.items()
        if (root / "hub" / f"published_{name}.json").exists()
    ]
    models = [model_dir(config.scale, root_of(job.task), job.model, results) for job in wanted]
    drawn = sorted(root.glob("hub/repositories/*.json")) if config.scale_entry.hub == "random" else []
    paths = [*drawn, *sorted(root.glob("hub/*.json")), *sorted(root.glob("cache/*/*.json")), *runs]
    paths += [folder / f"{what}.json" for what in ("images", "scores") for folder in models]
    untuned = [manifest(folder, what, untuned=True) for what in ("images", "scores") for folder in models]
    found = [*paths, *(path for path in untuned if path.exists())]
    return {str(path.relative_to(root).with_suffix("")): path for path in found}


def records(config: Config, results: Path) -> list[dict]:
    """What every job cost; UserError if a record is not there."""
    found = []
    for name, path in record_files(config, results).items():
        if not path.exists():
            raise UserError(f"{path} is not there; run `snakemake --cores 2` first.")
        found.append({"job": name, **read_json(path)["cost"]})
    return found


def gpu_hours(record: dict) -> float | None:
    """Processes times wall time of a job that saw a GPU, else None."""
    if not record["hardware"].get("gpus"):
        return None
    return record.get("processes", 1) * record["cost"]["wall_s"] / 3600


def stage(job: str) -> str:
    if job.startswith("hub/repositories/"):
        return "random weights"
    if job.startswith("hub/preference_model_"):
        return "preference models"
    first, last = job.split("/")[0], job.split("/")[-1]
    return STAGES.get(first) or STAGES.get(last, last.removeprefix("untuned_"))


def tables(config: Config, results: Path) -> list[str]:
    """By stage, with the sum, and by job."""
    frame = pd.DataFrame(records(config, results)).reindex(columns=["job", *COLUMNS])
    if frame[GPU].isna().all():
        frame = frame.drop(columns=GPU)
    sums = {name: "max" if name.startswith("peak") else "sum" for name in COLUMNS if name in frame}
    by_stage = frame.assign(stage=frame["job"].map(stage), jobs=1).groupby("stage", sort=False, as_index=False)
    by_stage = by_stage.agg({"jobs": "sum", **sums})
    total = pd.DataFrame([{"stage": "**sum** (peak: largest)", **by_stage.agg({"jobs": "sum", **sums})}])
    return [_markdown(pd.concat([by_stage, total], ignore_index=True).astype({"jobs": int})), _markdown(frame)]


def _markdown(frame: pd.DataFrame) -> str:
    texts = frame.rename(columns=COLUMNS)
    for name, form in {"wall s": ".0f", "CPU s": ".0f", "peak RSS GiB": ".2f", "peak GPU GiB": ".2f"}.items():
        if name in texts:
            texts[name] = [f"{value:{form}}" if value == value else "" for value in texts[name]]  # not for NaN
    texts["UNet forwards"] = [f"{int(v):,}" if v > 0 else "" for v in texts["UNet forwards"].fillna(0)]
    return texts.to_markdown(index=False, disable_numparse=True, colalign=("left", *["right"] * (texts.shape[1] - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    with sentences("cost"):
        config = from_arguments(args)
        with atomic(scale_dir(config.scale, args.results) / "cost.md") as part:
            part.write_text("\n\n".join(tables(config, args.results)) + "\n")


if __name__ == "__main__":
    main()
