"""Runs and tables as the workflow leaves them, with numbers of our own: for cards and what is published."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from safetensors.numpy import save_file

from pso.campaign import Run
from pso.entries import UNTUNED, Config
from pso.hub import recorded
from pso.paths import LORA_FILE, run_dir, scale_dir

RUN = Run("preference", "sdxl_dmd2", "pso_offline", 0)
COUNTS = {"rows": 60, "pairs": 55, "dropped": {"tie": 2, "missing_caption": 3, "bad_label": 0}}


def folder_of(config: Config, results: Path, run: Run = RUN) -> Path:
    return run_dir(config.scale, run.task, run.model, run.method, run.seed, results)


def write_run(config: Config, results: Path, run: Run = RUN, lora: bool = True) -> Path:
    """A finished run: its record has what the card reads of it, in the form of pso/tune.py."""
    folder, method = folder_of(config, results, run), config.methods[run.method]
    settings = {
        "scale": config.scale,
        "task": run.task,
        "model": {run.model: config.models[run.model].model_dump()},
        "method": {run.method: method.model_dump()},
        "dataset": {method.data: recorded(config.datasets[method.data])},
        "metrics": {name: config.metrics[name].model_dump() for name in method.metrics},
        "seed": run.seed,
        **config.scale_entry.model_dump(include={"dtype", "speed"}),
    }
    record = {"config": settings, "code": {"commit": "0" * 40, "dirty": None}, "data": COUNTS, "lora_parameters": 24}
    record["versions"] = {"diffusers": "0.42.1"}
    (folder / "lora").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "train.jsonl").write_text('{"event": "update", "update": 1, "loss": 0.69}\n')
    if lora:
        layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        state = {f"{layer}.lora_A.weight": np.ones((4, 2)), f"{layer}.lora_B.weight": np.zeros((4, 4))}
        save_file(state, folder / "lora" / LORA_FILE)
    return folder


def value(place: int, line: int) -> float:
    """A cell of the tables below: different in every column and row."""
    return round(0.25 + place + line / 16, 4)


def write_tables(config: Config, results: Path, num_runs: int = 1) -> dict[str, pd.DataFrame]:
    """The csv of every table asked for, as eval/tables.py writes it: intervals of +- 1/8."""
    folder, found = scale_dir(config.scale, results) / "tables", {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in config.tables:
        table, lines = config.table_entries[name], []
        for eval_set in table.eval_sets:
            for row in table.all_rows:
                line = {"eval_set": eval_set, "label": row.label, "model": row.model, "method": row.method}
                for place, metric in enumerate([*table.metrics, *table.extra_metrics]):
                    cell = value(place, len(lines))
                    line |= {metric: cell, f"{metric}_low": cell - 0.125, f"{metric}_high": cell + 0.125}
                runs = 1 if row.method == UNTUNED else num_runs
                line |= {"num_prompts": 24, "num_images": 288, "num_runs": runs, "dropped": "", "status": ""}
                lines.append(line)
        found[name] = pd.DataFrame(lines)
        found[name].to_csv(folder / f"{name}.csv", index=False)
    return found
