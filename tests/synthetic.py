"""A made-up configuration and a tree of made-up scores and images for the tests of eval/. No torch."""

import io
import json
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pso import paths
from pso.entries import (
    UNTUNED,
    ClaimEntry,
    Config,
    DatasetEntry,
    MethodEntry,
    MetricEntry,
    ModelEntry,
    Row,
    ScaleEntry,
    TableEntry,
)
from pso.standin_entries import StandIn

EVAL_SETS = ("pickapic_test", "parti_prompts")
NUM_PROMPTS, NUM_SEEDS = 30, 2
ROWS = [
    Row(label="SDXL", model="sdxl", method=UNTUNED, steps=50),
    Row(label="SDXL-DPO", steps=50, missing="not built yet"),
    Row(label="SDXL-DMD2", model="sdxl_dmd2", method=UNTUNED, steps=4),
    Row(label="Offline-PSO w/ SDXL-DMD2", model="sdxl_dmd2", method="pso_offline", steps=4),
    Row(label="Online-PSO w/ SDXL-DMD2", model="sdxl_dmd2", method="pso_online", steps=4),
]
NAIVE = Row(label="Naive fine-tune w/ SDXL-DMD2", model="sdxl_dmd2", method="diffusion", steps=4)
GAIN = {"pso_offline": 0.01, "pso_online": 0.02, "diffusion": -0.03}  # on top of an untuned row's score
LEVEL = {"pick_score": 0.22, "clip_score": 0.36, "sharpness": 1.0}


def metric(title: str, decimals: int = 4, **more) -> MetricEntry:
    return MetricEntry(title=title, module="eval.metrics.none", decimals=decimals, **more)


def table(**changes) -> TableEntry:
    fields = {
        "caption": "Made-up scores.",
        "label": "tab:table1",
        "eval_sets": list(EVAL_SETS),
        "metrics": ["pick_score", "clip_score", "image_reward"],
        "missing_metrics": {"image_reward": "not built yet"},
        "extra_metrics": ["sharpness"],
        "rows": ROWS,
        "extra_rows": [NAIVE],
    }
    return TableEntry(**(fields | changes))


def claim(**changes) -> ClaimEntry:
    fields = {
        "text": "Online-PSO raises PickScore.",
        "source": "Table 1",
        "group": "Online-PSO",
        "table": "table1",
        "left": "Online-PSO w/ SDXL-DMD2",
        "right": "SDXL-DMD2",
        "metric": "pick_score",
        "eval_sets": list(EVAL_SETS),
        "relation": "above",
    }
    return ClaimEntry(**(fields | changes))


def config(**changes) -> Config:
    """Built by hand and not from workflow/config, so that a test says what it depends on."""
    methods = {
        name: MethodEntry.model_construct(title=name, module="none", data="pairs", reward=reward, objective={})
        for name, reward in {"pso_offline": None, "pso_online": "pick_score", "diffusion": None}.items()
    }
    dataset = DatasetEntry(format="parti_tsv", repo="none/none", files="none", num_seeds=NUM_SEEDS)
    fields = {
        "scale": "miniature",
        "seeds": [0],
        "tables": ["table1"],
        "scale_entry": ScaleEntry.model_construct(
            # as the shipped scales have it: weights and data are fetched or a stand-in
            standin=None if changes.get("scale") in ("paper", "reduced") else StandIn.model_construct(),
            eval_seed=0,
            bootstrap_resamples=200,
            caption="a stand-in world.",
        ),
        "models": {name: ModelEntry.model_construct(title=name) for name in ("sdxl", "sdxl_dmd2")},
        "methods": methods,
        "metrics": {
            "pick_score": metric("PickScore", decimals=2, scale=100.0),
            "clip_score": metric("CLIP"),
            "sharpness": metric("Sharpness", decimals=3),
        },
        "datasets": {name: dataset for name in EVAL_SETS},
        "table_entries": {"table1": table()},
        "claims": {"online_above": claim()},
    }
    return Config.model_construct(**(fields | changes))


def frame(row: Row, eval_set: str, metric: str, run_seed: int = 0) -> pd.DataFrame:
    """Scores that share prompt and image noise over rows; what differs is GAIN and a little noise."""
    shared = np.random.default_rng([crc32(eval_set.encode()), crc32(metric.encode())])
    prompt = np.repeat(shared.normal(0, 0.03, NUM_PROMPTS), NUM_SEEDS)
    image = shared.normal(0, 0.01, NUM_PROMPTS * NUM_SEEDS)
    key = [crc32(text.encode()) for text in (row.label, eval_set, metric)]
    own = np.random.default_rng([*key, run_seed]).normal(0, 0.003, len(image))
    prompt_ids = np.repeat([f"p{i:03d}" for i in range(NUM_PROMPTS)], NUM_SEEDS)
    seeds = np.tile(np.arange(NUM_SEEDS), NUM_PROMPTS)
    return pd.DataFrame(
        {
            "image_id": [f"{p}-{s}" for p, s in zip(prompt_ids, seeds, strict=True)],
            "prompt_id": prompt_ids,
            "image_seed": seeds,
            "score": LEVEL[metric] + GAIN.get(row.method, 0.0) + prompt + image + own,
        }
    )


def scores_path(cfg: Config, results: Path, row: Row, eval_set: str, metric: str, run_seed: int = 0) -> Path:
    run = paths.run_dir(cfg.scale, "preference", row.model, row.method, run_seed, results)
    return paths.scores_file(run, eval_set, row.steps, metric)


def write_scores(path: Path, scores: pd.DataFrame, row: Row, eval_set: str, metric: str, **changes) -> None:
    told = {
        "metric": metric,
        "spec": {"name": metric, "sha256": "0" * 64},
        "model": row.model,
        "method": row.method,
        "eval_set": eval_set,
        "steps": row.steps,
        "num_images": len(scores),
        "dropped": {},
    } | changes
    parquet = pa.Table.from_pandas(scores, preserve_index=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(parquet.replace_schema_metadata({"pso_bench": json.dumps(told)}), path)


def write_tree(cfg: Config, results: Path) -> Path:
    """Scores of every row, eval set and metric of table1 that is not declared missing."""
    entry = cfg.table_entries["table1"]
    for row in entry.all_rows:
        for eval_set in entry.eval_sets if row.missing is None else ():
            for name in [*entry.metrics, *entry.extra_metrics]:
                for seed in [0] if row.method == UNTUNED else cfg.seeds:
                    if name not in entry.missing_metrics:
                        path = scores_path(cfg, results, row, eval_set, name, seed)
                        write_scores(path, frame(row, eval_set, name, seed), row, eval_set, name)
    return results


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_images(
    cfg: Config, results: Path, row: Row, eval_set: str, size: int = 32, num_shards: int = 2, task: str = "preference"
) -> None:
    """Flat images: the grey level tells the prompt, a bright column the row of the table, a red line the top."""
    run = paths.run_dir(cfg.scale, task, row.model, row.method, 0, results)
    folder = paths.images_dir(run, eval_set, row.steps)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for prompt in range(NUM_PROMPTS):
        for seed in range(NUM_SEEDS):
            pixels = np.full((size, size, 3), 5 * prompt % 256, np.uint8)
            pixels[:, len(row.label) % size] = 255
            pixels[0] = (255, 0, 0)  # red above
            text = f"a long prompt number {prompt} about a red circle on the left of a black background"
            lines.append([f"p{prompt:03d}-{seed}", f"p{prompt:03d}", text, seed, png(pixels)])
    images = pd.DataFrame(lines, columns=["image_id", "prompt_id", "prompt", "image_seed", "png"])
    for k in range(num_shards):
        images.iloc[k::num_shards].to_parquet(folder / f"shard{k}.parquet", index=False)
