"""Everything that decides a result, and nothing that does not: the params of the workflow's rules. Torch-free.

A job keeps those of its run in run.json, so that `python -m pso.doctor --why RUN` can say what has changed since.
"""

from typing import Any

from pso.checks import source_of
from pso.entries import PATHS, Config
from pso.hub import recorded


def model_params(config: Config, model: str, steps: int | None = None, context: dict | None = PATHS) -> dict[str, Any]:
    """A model as it is sampled; with `steps`, only on that grid. A folder of the user's own is told by its path: other
    weights may have the same name."""
    found = config.models[model].model_dump(exclude={"title"}, context=context)
    if steps is not None:
        found["grids"] = {steps: found["grids"][steps]}
    return found


def pair_params(config: Config, model: str, dataset: str) -> dict[str, Any]:
    """A model as it encodes pictures, and as it is sampled where its samples are the references."""
    if config.datasets[dataset].format == "imagefolder":
        return model_params(config, model, config.models[model].tuned_steps)
    return config.models[model].model_dump(include={"base", "vae", "resolution"}, context=PATHS)


def method_params(config: Config, method: str) -> dict[str, Any]:
    entry = config.methods[method]
    found = entry.model_dump(exclude={"title": True, "tune": {"checkpoint_every"}})
    return {**found, "data": config.datasets[entry.data].model_dump()}


def scorer_params(config: Config, metric: str, context: dict | None = PATHS) -> dict[str, Any]:
    """What decides a score; how it is printed does not."""
    decides = {"module", "implementation", "settings", "checkpoint", "head", "architecture", "compared_with"}
    return config.metrics[metric].model_dump(include=decides, context=context)


def run_modules(config: Config, method: str) -> list[str]:
    """The modules that decide a run's numbers, with all that they import."""
    entry = config.methods[method]
    source = source_of(entry.module) or ""
    own = [source] if ":" in source else []  # pso.tune imports the others
    return ["pso.tune", entry.module, *own, *(config.metrics[name].module for name in entry.metrics)]


def run_params(config: Config, model: str, method: str, context: dict | None = PATHS) -> dict[str, Any]:
    """Of one tuning run, its code apart."""
    return {
        "method": method_params(config, method),
        "model": model_params(config, model, config.models[model].tuned_steps, context),
        "rewards": {name: scorer_params(config, name, context) for name in config.methods[method].metrics},
        **config.scale_entry.model_dump(include={"dtype", "speed"}),
    }


def kept_params(config: Config, model: str, method: str) -> dict[str, Any]:
    """Those of one run as its run.json keeps them: of a folder of the user's own only the name; whether its files are
    the same is told by the sha256 of every input."""
    found = run_params(config, model, method, context=None)
    return {**found, "method": {**found["method"], "data": recorded(config.datasets[config.methods[method].data])}}
