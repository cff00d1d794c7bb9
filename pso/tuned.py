"""A finished tuning run as its run.json tells of it, and a run by its folder. Torch-free."""

import os
from dataclasses import dataclass
from pathlib import Path

from pso.campaign import Run
from pso.config import ConfigError, check
from pso.entries import Config, MethodEntry, ModelEntry
from pso.paths import LORA_FILE, RESULTS, run_dir
from pso.provenance import UserError, read_json


@dataclass(frozen=True)
class Tuned:
    """A finished run as its run.json tells of it."""

    run: Run
    folder: Path
    record: dict
    model: ModelEntry
    method: MethodEntry

    @property
    def lora(self) -> Path:
        return self.folder / "lora" / LORA_FILE

    @property
    def steps(self) -> int:
        return self.model.tuned_steps

    @property
    def dataset(self) -> dict:
        return self.record["config"]["dataset"][self.method.data]

    @property
    def place(self) -> str:
        """Its folder of the LoRA from the repository's root, wherever results lie."""
        told = self.record["config"]
        return str(
            run_dir(told["scale"], *(getattr(self.run, k) for k in ("task", "model", "method", "seed"))) / "lora"
        )


def tuned(config: Config, run: Run, results: Path = RESULTS) -> Tuned:
    """Read, or a sentence that says what makes it."""
    folder = run_dir(config.scale, run.task, run.model, run.method, run.seed, results)
    path, again = folder / "run.json", tune_command(config, run)
    for needed in (path, folder / "lora" / LORA_FILE):
        if not needed.is_file():
            raise UserError(f"{needed} is not there, so the run is not finished; {again} makes it.")
    record = read_record(path, run, again)
    told = record["config"]
    grids = {int(steps): grid for steps, grid in told["model"][run.model]["grids"].items()}  # JSON's keys are texts
    model = check(ModelEntry, told["model"][run.model] | {"grids": grids}, f"{path}: config.model.{run.model}")
    method = check(MethodEntry, told["method"][run.method], f"{path}: config.method.{run.method}")
    return Tuned(run, folder, record, model, method)


def read_record(path: Path, run: Run, again: str) -> dict:
    """run.json, with all that a card tells of it."""
    record = read_json(path, f"{again} makes it anew")
    told, needed = record.get("config", {}), ("config", "code", "versions", "data", "lora_parameters")
    absent = [key for key in needed if key not in record]
    named = (("model", run.model), ("method", run.method))
    absent += [f"config.{key}.{name}" for key, name in named if name not in told.get(key, {})]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}; {again} makes it anew.")
    return record


def tune_command(config: Config, run: Run) -> str:
    return (
        f"`python -m pso.tune --task {run.task} --model {run.model} --method {run.method} --seed {run.seed} "
        f'--set \'{{"scale": "{config.scale}"}}\'`'
    )


def run_of(folder: Path, scales: list[str]) -> tuple[str, Run, Path]:
    """Scale, run and results folder by the path grammar; a task with a subject has one folder more."""
    parts = Path(os.path.abspath(folder)).parts
    for depth in (1, 2):
        place = len(parts) - 3 - depth - 1
        if place < 1 or parts[place] not in scales or not parts[-1].removeprefix("seed").isdigit():
            continue
        task = "/".join(parts[place + 1 : place + 1 + depth])
        run = Run(task, parts[-3], parts[-2], int(parts[-1].removeprefix("seed")))
        return parts[place], run, Path(os.path.relpath(Path(*parts[:place])))
    raise ConfigError(
        f"RUN is {str(folder)!r}; expected the folder of a run, results/{{scale}}/{{task}}/{{model}}/{{method}}/"
        "seed{seed}, such as results/miniature/preference/sdxl_dmd2/pso_offline/seed0."
    )
