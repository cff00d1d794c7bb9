"""What the configuration's entries must have in common: names, grids, claims, and a method with its module.

Each check stops at the first wrong value with one sentence. Torch-free: method modules are read, not imported.
"""

import ast
import difflib
import json
import math
import operator
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pso.entries import UNTUNED, ClaimEntry, Config, MethodEntry, ModelEntry, Row, TableEntry, is_outside
from pso.provenance import UserError

ROOT = Path(__file__).resolve().parent.parent
SCHEMA_DIR = ROOT / "workflow" / "schemas"
NUM_TIMES = 1000  # of SDXL's schedule: t = 0..999
STOCHASTIC = ("renoise", "ancestral")  # samplers whose transitions have a density

# The formats of data that each SOURCE, a class of pso/sources.py or module:class, can work from; pairs have
# prompts as well.
PAIRS = ("preference_parquet", "imagefolder")
TARGETS = (*PAIRS, "dreambooth")  # pictures, the reference side of pairs left aside
PROMPTS = ("caption_parquet", "caption_json", "parti_tsv", *PAIRS)
SOURCES = {
    "PreferencePairs": PAIRS,
    "ContrastPairs": ("preference_parquet",),
    "Targets": TARGETS,
    "TargetsAgainstModel": TARGETS,
    "OnlinePairs": PROMPTS,
    "pso.stepwise:StepwisePairs": PROMPTS,
}
RANKED = ("OnlinePairs", "pso.stepwise:StepwisePairs")  # sources that need a reward
EMBEDDED = ("ContrastPairs",)  # sources that need embeddings

RANGES = {  # JSON Schema's words -> ours, and when a value is outside
    "exclusiveMinimum": ("above", operator.le),
    "minimum": ("of at least", operator.lt),
    "exclusiveMaximum": ("below", operator.ge),
    "maximum": ("of at most", operator.gt),
}


class ConfigError(UserError):
    """One sentence about one wrong value."""


def shown(value: Any) -> str:
    return f"{value!r} (text)" if isinstance(value, str) else repr(value)


def unknown_key(path: str, key: str, known: list[str]) -> ConfigError:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}."
    return ConfigError(f"{path}.{key} is not a known key; {hint}")


def known(where: str, name: str | None, names: Iterable[str]) -> None:
    if name is not None and name not in names:
        close = difflib.get_close_matches(name, list(names), n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(names)}."
        raise ConfigError(f"{where} is {shown(name)}, which has no entry; {hint}")


def check_entries(config: Config) -> None:
    if config.scale_entry.standin is not None and config.scale_entry.random is not None:
        raise ConfigError(f"scales.{config.scale} has standin and random; expected one of them, or neither.")
    if config.scale_entry.speed.merge_lora and config.scale_entry.dtype != "float32":
        raise ConfigError(
            f"scales.{config.scale}.speed.merge_lora is true and dtype is {config.scale_entry.dtype}, in which weights "
            "have no room for a young LoRA; expected false, or dtype float32."
        )
    if config.scale_entry.hub != "standin":
        check_repositories(config)
    for i, table in enumerate(config.tables):
        known(f"config.tables[{i}]", table, config.table_entries)
    for name, model in config.models.items():
        check_model(name, model)
    for name, table in config.table_entries.items():
        check_table(config, name, table)
    for name, claim in config.claims.items():
        check_claim(config, name, claim)
    for name, metric in config.metrics.items():
        known(f"metrics.{name}.copy_of", metric.copy_of, config.metrics)
    for name, method in config.methods.items():
        known(f"methods.{name}.data", method.data, config.datasets)
        known(f"methods.{name}.reward", method.reward, config.metrics)
        known(f"methods.{name}.embeddings", method.embeddings, config.metrics)
        known(f"methods.{name}.tune.probe_reward", method.tune.probe_reward, config.metrics)
        for probed in method.tune.probe_metrics:
            known(f"methods.{name}.tune.probe_metrics", probed, config.metrics)
        check_judges(config, name, method)
        check_objective(name, method)
        check_source(config, name, method)
    for name, table in config.table_entries.items():
        check_subjects(config, name, table)


def check_repositories(config: Config) -> None:
    """Whatever is not made by the workflow has an entry that says what is fetched of it and on which terms."""
    entries = config.repositories
    named = {*entries, *(mirror for entry in entries.values() for mirror in entry.mirrors)}
    for field, repo in _repositories(config):
        if repo is not None and not is_outside(repo) and repo not in named:
            raise ConfigError(
                f"{field} is {shown(repo)}, which has no entry in repositories.yaml; add one: its files, size_gb and "
                "licence."
            )


def _repositories(config: Config) -> Iterator[tuple[str, str | None]]:
    for name, model in config.models.items():
        parts = {"unet": model.unet} | {f"deltas[{i}]": delta for i, delta in enumerate(model.deltas)}
        parts |= {f"loras[{i}]": lora for i, lora in enumerate(model.loras)}
        yield from ((f"models.{name}.{field}", getattr(model, field)) for field in ("base", "vae", "preview_vae"))
        yield from ((f"models.{name}.{field}.repo", part.repo) for field, part in parts.items() if part is not None)
        yield from ((f"models.{name}.deltas[{i}].minus", delta.minus) for i, delta in enumerate(model.deltas))
    for name, metric in config.metrics.items():
        for field, part in metric.checkpoints.items():
            yield f"metrics.{name}.{field}.repo", part.repo
            yield f"metrics.{name}.{field}.processor", part.processor
    yield from ((f"datasets.{name}.repo", dataset.repo) for name, dataset in config.datasets.items())


# ---- models ----


def check_model(name: str, model: ModelEntry) -> None:
    check_weights(name, model)
    for steps, grid in model.grids.items():
        where = f"models.{name}.grids.{steps}"
        if not 1 <= steps < NUM_TIMES:
            raise ConfigError(f"{where} is a grid of {steps} steps; expected a key from 1 to {NUM_TIMES - 1}.")
        if isinstance(grid, str):
            continue
        if grid != sorted(set(grid), reverse=True) or not all(0 <= t < NUM_TIMES for t in grid):
            raise ConfigError(f"{where} is {grid}; expected different times from {NUM_TIMES - 1} to 0, falling.")
        if len(grid) != steps:
            raise ConfigError(f"{where} is {grid}, which are {len(grid)} times; expected as many as its key, {steps}.")
    tuned = model.tuned_steps
    if tuned is None:
        return
    if tuned not in model.grids:
        raise ConfigError(f"models.{name}.tuned_steps is {tuned}; expected a key of its grids: {_keys(model)}.")
    if tuned < 2:
        raise ConfigError(
            f"models.{name}.tuned_steps is {tuned}; expected at least 2, because the last step is deterministic and "
            "is not trained."
        )


def check_weights(name: str, model: ModelEntry) -> None:
    sources = {"unet": model.unet} | {f"deltas[{i}]": delta for i, delta in enumerate(model.deltas)}
    for field, source in sources.items():
        if source is not None and None not in (source.file, source.subfolder):
            raise ConfigError(f"models.{name}.{field} has file and subfolder; expected one of them.")
    if model.guidance_embedding is not None and model.guidance_scale > 1:
        raise ConfigError(
            f"models.{name}.guidance_scale is {model.guidance_scale}; expected at most 1, because guidance_embedding "
            "tells the network of its guidance already."
        )


def _keys(model: ModelEntry) -> str:
    return ", ".join(map(str, model.grids))


# ---- tables and claims ----


def check_table(config: Config, name: str, table: TableEntry) -> None:
    for metric in [*table.metrics, *table.extra_metrics]:
        if metric not in table.missing_metrics:
            known(f"tables.{name}.metrics", metric, config.metrics)
    for eval_set in table.eval_sets:
        known(f"tables.{name}.eval_sets", eval_set, config.datasets)
    for row in table.shown_rows:  # another may name a model or method that is yet to come
        check_row(config, f"tables.{name} row {row.label!r}", row)


def check_subjects(config: Config, name: str, table: TableEntry) -> None:
    """A table with subjects is made from folders of subjects and from nothing else."""
    used = [(f"eval_sets names {eval_set}", eval_set) for eval_set in table.eval_sets]
    for row in table.shown_rows:
        if row.method != UNTUNED:
            data = config.methods[row.method].data
            used.append((f"row {row.label!r} trains on {data}", data))
    for what, dataset in used:
        found = config.datasets[dataset].format
        if (found == "dreambooth") != bool(table.subjects):
            needed = "dreambooth, because the table has subjects" if table.subjects else "one without subjects"
            raise ConfigError(f"tables.{name} {what}, whose format is {found}; expected {needed}.")


def check_row(config: Config, where: str, row: Row) -> None:
    known(f"{where} model", row.model, config.models)
    known(f"{where} method", row.method, [UNTUNED, *config.methods])
    if row.model is None or row.method is None:
        raise ConfigError(f"{where} needs model and method, or the reason in missing.")
    model = config.models[row.model]
    if row.steps not in model.grids:
        raise ConfigError(f"{where} steps is {row.steps}; expected a key of models.{row.model}.grids: {_keys(model)}.")
    if row.method != UNTUNED and None in (model.lora_rank, model.tuned_steps):
        raise ConfigError(
            f"{where} method is {shown(row.method)}; expected {UNTUNED}, because models.{row.model} has no lora_rank "
            "or no tuned_steps."
        )
    if row.method != UNTUNED:
        check_evidence(where, row.model, model, row.method, config.methods[row.method])


def check_evidence(where: str, name: str, model: ModelEntry, method_name: str, method: MethodEntry) -> None:
    """Only a method that trains the network at given times, as diffusion models are, does without a kernel."""
    if not ours(method.module) or method.objective.get("times") is not None:
        return
    if model.sampler not in STOCHASTIC:
        raise ConfigError(
            f"{where} method is {shown(method_name)}; expected one with objective.times, because the sampler of "
            f"models.{name}, {shown(model.sampler)}, is deterministic and its steps have no log-probability."
        )


def check_claim(config: Config, name: str, claim: ClaimEntry) -> None:
    known(f"claims.{name}.table", claim.table, config.table_entries)
    table = config.table_entries[claim.table]
    labels = [row.label for row in table.all_rows]
    known(f"claims.{name}.left", claim.left, labels)
    known(f"claims.{name}.right", claim.right, labels)
    known(f"claims.{name}.metric", claim.metric, [*table.metrics, *table.extra_metrics])
    for eval_set in claim.eval_sets:
        known(f"claims.{name}.eval_sets", eval_set, table.eval_sets)
    if (claim.relation == "at_least_share") != (claim.share is not None):
        raise ConfigError(f"claims.{name}.share is {claim.share}; expected a number with at_least_share, else none.")


# ---- a method and its module ----


def ours(module: str) -> bool:
    """Whether a dotted path lies in this repository."""
    return module.split(".")[0] in ("pso", "baselines")


def check_objective(name: str, method: MethodEntry) -> None:
    """methods.<name>.objective against the JSON Schema of its module.

    A module from elsewhere has no schema here; its Config checks the values when the job starts.
    """
    path = SCHEMA_DIR / "methods" / f"{method.module}.json"
    if not path.exists():
        if ours(method.module):
            raise ConfigError(
                f"methods.{name}.module is {shown(method.module)}, which has no schema; is the name right? "
                "After adding a method run `python -m pso.config --write-schemas`."
            )
        return
    import jsonschema

    schema = json.loads(path.read_text())
    where = f"methods.{name}.objective"
    for key in method.objective:
        if key not in schema["properties"]:
            raise unknown_key(where, key, sorted(schema["properties"]))
    for key, value in method.objective.items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON Schema has no word for it
            raise ConfigError(f"{where}.{key} is {value}; expected a finite number.")
    error = next(iter(jsonschema.Draft202012Validator(schema).iter_errors(method.objective)), None)
    if error is None:
        return
    if error.validator == "required":
        raise ConfigError(f"{where}.{error.message.split(chr(39))[1]} is missing; it is needed.")
    field = ".".join([where, *map(str, error.path)])
    options = error.schema.get("anyOf", [error.schema])
    expected = " or ".join(_described(option, error.instance) for option in options)
    raise ConfigError(f"{field} is {shown(error.instance)}; expected {expected}.")


def _described(option: dict, value: Any) -> str:
    """A JSON Schema of one value in words; the range too where only that is wrong."""
    if "enum" in option:
        return " or ".join(map(str, option["enum"]))
    kinds = {"number": "a number", "integer": "a whole number", "boolean": "true or false", "null": "null"}
    words = [kinds.get(option.get("type"), str(option.get("type")))]
    if isinstance(value, int | float) and not isinstance(value, bool):
        words += [
            f"{word} {option[key]:g}"
            for key, (word, outside) in RANGES.items()
            if key in option and outside(value, option[key])
        ]
    return " ".join(words)


def check_judges(config: Config, name: str, method: MethodEntry) -> None:
    """In training there is nothing to compare a picture with."""
    for metric in method.metrics:
        if (others := config.metrics[metric].compared_with) is not None:
            raise ConfigError(
                f"methods.{name} measures {metric}, which compares with {others}; expected a metric of single pictures "
                "in reward, tune.probe_reward and tune.probe_metrics."
            )


def check_source(config: Config, name: str, method: MethodEntry) -> None:
    """A method's data and reward against what its SOURCE works from; a module from elsewhere is not read."""
    if not ours(method.module):
        return
    source = source_of(method.module)
    if ":" in (source or "") and source not in SOURCES:  # package.module:Name, a source from elsewhere
        return
    if source not in SOURCES:
        raise ConfigError(
            f"methods.{name}.module is {shown(method.module)}, whose SOURCE is {source}; "
            f"expected a line SOURCE = with one of {', '.join(SOURCES)} in it."
        )
    data = config.datasets[method.data]
    if data.format not in SOURCES[source]:
        raise ConfigError(
            f"methods.{name}.data is {shown(method.data)}, whose format is {data.format}; "
            f"expected {' or '.join(SOURCES[source])}, which {source} of {method.module} needs."
        )
    if source in RANKED and method.reward is None:
        raise ConfigError(
            f"methods.{name}.reward is None; expected the name of a metric, by which {source} of {method.module} "
            "ranks its samples."
        )
    if source in EMBEDDED and method.embeddings is None:
        raise ConfigError(
            f"methods.{name}.embeddings is None; expected the name of a metric, by whose CLIP {source} of "
            f"{method.module} compares its pairs."
        )


def source_of(module: str) -> str | None:
    """The text of `SOURCE = "..."` in the file of one of this repository's method modules."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    for node in ast.parse(path.read_text()).body if path.exists() else []:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["SOURCE"]:
            return node.value.value if isinstance(node.value, ast.Constant) else None
    return None
