"""The path grammar of results/ (also printed in results/README.md). Torch-free.

results/{scale}/{task}/{model}/{method}/seed{seed}/          one run; task of a subject: concept/{subject}
    lora/pytorch_lora_weights.safetensors  run.json  config.yaml  train.jsonl  timeline.jsonl  tune.log  state/
    images/{eval_set}/steps{n}/shard{k}.parquet
    scores/{eval_set}/steps{n}/{metric}.parquet
results/{scale}/{task}/{model}/images.json scores.json       all runs of a model and task, all subjects together
results/{scale}/{task}/{model}/untuned_images.json untuned_scores.json calibrate.json    its untuned rows alone
results/{scale}/calibrate.{md,json}                          the untuned rows against the paper's cells
results/{scale}/cache/{model or metric}/{dataset}.safetensors .json     latents, embeddings
results/{scale}/cache/texts/{owner}--{name}.safetensors .json        text conditions by a base's text encoders
results/{scale}/report.html  tables/  claims.{md,json}  figures/  hub/
"""

from pathlib import Path

RESULTS = Path("results")
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
REFERENCE = Path(__file__).resolve().parent.parent / "eval" / "reference"


def scale_dir(scale: str, results: Path = RESULTS) -> Path:
    return Path(results) / scale


def subject_of(task: str) -> str | None:
    """The subject of a task such as concept/teapot."""
    return task.partition("/")[2] or None


def root_of(task: str) -> str:
    """concept of concept/teapot; a task without subject is its own root."""
    return task.partition("/")[0]


def model_dir(scale: str, task: str, model: str, results: Path = RESULTS) -> Path:
    return scale_dir(scale, results) / task / model


def run_dir(scale: str, task: str, model: str, method: str, seed: int, results: Path = RESULTS) -> Path:
    return model_dir(scale, task, model, results) / method / f"seed{seed}"


def finished_state(run: Path) -> Path:
    """Checkpoints of a finished run, until the workflow has seen its end and makes its images."""
    return run / ".state.done"


def manifest(folder: Path, what: str, untuned: bool = False) -> Path:
    """images.json or scores.json of a model_dir; `untuned`: of its untuned rows alone."""
    return folder / f"{'untuned_' if untuned else ''}{what}.json"


def images_dir(run: Path, eval_set: str, steps: int) -> Path:
    return run / "images" / eval_set / f"steps{steps}"


def scores_file(run: Path, eval_set: str, steps: int, metric: str) -> Path:
    return run / "scores" / eval_set / f"steps{steps}" / f"{metric}.parquet"


def texts_file(scale: str, base: str, results: Path = RESULTS) -> Path:
    """Text conditions of prompts by the text encoders of a base, a repository."""
    return scale_dir(scale, results) / "cache" / "texts" / f"{base.replace('/', '--')}.safetensors"


def reference_file(table: str) -> Path:
    """The paper's cells of a table, if it has it."""
    return REFERENCE / f"{table}.csv"
