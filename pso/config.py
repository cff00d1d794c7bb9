"""Reading workflow/config: files, overrides, the scale's deviations, and errors as one sentence.

Torch-free, so that `snakemake -n` starts in seconds. `python -m pso.config` checks the folder;
`--write-schemas` writes workflow/schemas/ from pso/entries.py and the methods' own Config classes.
"""

import argparse
import contextlib
import copy
import difflib
import importlib
import json
import math
import operator
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pso.entries import ENTRIES, TOP_LEVEL, UNTUNED, ClaimEntry, Config, MethodEntry, ScaleEntry, TableEntry
from pso.provenance import UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIG_DIR = ROOT / "workflow" / "config"
SCHEMA_DIR = ROOT / "workflow" / "schemas"
SETTINGS_VARIABLE = "PSO_BENCH_SETTINGS"


class ConfigError(UserError):
    """One sentence about one wrong value."""


EXPECTED = {  # pydantic's error types -> what was expected, for people
    "float_type": "a number",
    "int_type": "a whole number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "a name in small letters, digits and _",
}

RANGES = {  # JSON Schema's words -> ours, and when a value is outside
    "exclusiveMinimum": ("above", operator.le),
    "minimum": ("of at least", operator.lt),
    "exclusiveMaximum": ("below", operator.ge),
    "maximum": ("of at most", operator.gt),
}


def _value(value: Any) -> str:
    return f"{value!r} (text)" if isinstance(value, str) else repr(value)


def _known_keys(model: type[BaseModel] | None) -> list[str]:
    return sorted(model.model_fields) if model else []


def unknown_key(path: str, key: str, known: list[str]) -> ConfigError:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}."
    return ConfigError(f"{path}.{key} is not a known key; {hint}")


def sentence(error: ValidationError, path: str, model: type[BaseModel]) -> ConfigError:
    """The first thing that is wrong, as one sentence."""
    first = error.errors()[0]
    where = ".".join([path, *map(str, first["loc"])])
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden":
        inner = model
        for part in first["loc"][:-1]:  # the model that holds the key, where it is a plain field
            inner = _field_model(inner, str(part))
        return unknown_key(".".join([path, *map(str, first["loc"][:-1])]), str(first["loc"][-1]), _known_keys(inner))
    if kind == "missing":
        return ConfigError(f"{where} is missing; it is needed.")
    expected = EXPECTED.get(kind, first["msg"]).format(**first.get("ctx", {}))
    extra = ""
    if kind in ("float_type", "int_type") and isinstance(value, str):
        with contextlib.suppress(ValueError):
            extra = f"; YAML reads it as text, write {_yaml_number(value, whole=kind == 'int_type')}"
    return ConfigError(f"{where} is {_value(value)}; expected {expected}{extra}.")


def _yaml_number(text: str, whole: bool) -> str:
    """How YAML wants the number that a text means: 1e-5 is text to it, 1.0e-05 a number."""
    if whole:
        return str(int(text))
    mantissa, _, exponent = repr(float(text)).partition("e")
    return mantissa if not exponent else f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}"


def _field_model(model: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    field = model.model_fields.get(name) if model else None
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def check(model: type[BaseModel], data: Any, path: str) -> BaseModel:
    """data as `model`, or ConfigError with `path` in front of the field."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise sentence(error, path, model) from None


def merged(base: dict, override: dict) -> dict:
    """`override` laid over `base`, mapping by mapping."""
    result = copy.deepcopy(base)
    for key, value in override.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else copy.deepcopy(value)
    return result


def _read(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; it is one of the configuration's files.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}; expected a mapping of names to entries.")
    return content


def load(overrides: dict | None = None, folder: Path = CONFIG_DIR) -> Config:
    """The folder's files, `overrides` (nested as the files are) on top, resolved for its scale."""
    folder, overrides = Path(folder), overrides or {}
    for key in overrides:
        if key not in TOP_LEVEL | set(ENTRIES):
            raise unknown_key("config", key, sorted(TOP_LEVEL | set(ENTRIES)))
    entries_of = {k: v for k, v in overrides.items() if isinstance(v, dict)}  # `tables` may be a list of names too
    top = merged(_read(folder / "config.yaml"), {k: v for k, v in overrides.items() if k not in entries_of})
    raw = {kind: merged(_read(folder / f"{kind}.yaml"), entries_of.get(kind, {})) for kind in ENTRIES}
    scale = top.get("scale")
    if not isinstance(scale, str) or scale not in raw["scales"]:
        raise ConfigError(f"config.scale is {_value(scale)}; expected one of {', '.join(raw['scales'])}.")
    scale_raw = raw["scales"][scale]
    check(ScaleEntry, scale_raw, f"scales.{scale}")

    entries = {}
    for kind, model in ENTRIES.items():
        entries[kind] = {n: check(model, entry, f"{kind}.{n}") for n, entry in raw[kind].items()}
        for name, override in (scale_raw.get(kind) or {}).items() if kind != "scales" else ():
            if name not in raw[kind]:
                raise unknown_key(f"scales.{scale}.{kind}", name, sorted(raw[kind]))
            entries[kind][name] = check(model, merged(raw[kind][name], override), f"scales.{scale}.{kind}.{name}")
    config = check(
        Config,
        {
            "seeds": top.get("seeds"),
            "tables": top.get("tables"),
            "scale": scale,
            "scale_entry": entries["scales"][scale],
            "table_entries": entries.pop("tables"),
            **{k: v for k, v in entries.items() if k != "scales"},
        },
        "config",
    )
    for key in top:
        if key not in TOP_LEVEL:
            raise unknown_key("config", key, sorted(TOP_LEVEL))
    _check_references(config)
    for name, method in config.methods.items():
        check_objective(name, method)
    return config


def _check_references(config: Config) -> None:
    """Every name that an entry uses is the name of an entry."""
    for i, table in enumerate(config.tables):
        _known(f"config.tables[{i}]", table, config.table_entries)
    for name, table in config.table_entries.items():
        _check_table(config, name, table)
    for name, claim in config.claims.items():
        _check_claim(config, name, claim)
    for name, method in config.methods.items():
        _known(f"methods.{name}.data", method.data, config.datasets)
        _known(f"methods.{name}.reward", method.reward, config.metrics)
        _known(f"methods.{name}.tune.probe_reward", method.tune.probe_reward, config.metrics)


def _known(where: str, name: str | None, names) -> None:
    if name is not None and name not in names:
        close = difflib.get_close_matches(name, list(names), n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(names)}."
        raise ConfigError(f"{where} is {_value(name)}, which has no entry; {hint}")


def _check_table(config: Config, name: str, table: TableEntry) -> None:
    for metric in [*table.metrics, *table.extra_metrics]:
        if metric not in table.missing_metrics:
            _known(f"tables.{name}.metrics", metric, config.metrics)
    for eval_set in table.eval_sets:
        _known(f"tables.{name}.eval_sets", eval_set, config.datasets)
    for row in [*table.rows, *table.extra_rows]:
        if row.missing is not None:  # may name a model or method that is yet to come
            continue
        _known(f"tables.{name} row {row.label!r} model", row.model, config.models)
        _known(f"tables.{name} row {row.label!r} method", row.method, [UNTUNED, *config.methods])
        if row.model is None or row.method is None:
            raise ConfigError(f"tables.{name} row {row.label!r} needs model and method, or the reason in missing.")


def _check_claim(config: Config, name: str, claim: ClaimEntry) -> None:
    _known(f"claims.{name}.table", claim.table, config.table_entries)
    table = config.table_entries[claim.table]
    labels = [row.label for row in [*table.rows, *table.extra_rows]]
    _known(f"claims.{name}.left", claim.left, labels)
    _known(f"claims.{name}.right", claim.right, labels)
    _known(f"claims.{name}.metric", claim.metric, [*table.metrics, *table.extra_metrics])
    for eval_set in claim.eval_sets:
        _known(f"claims.{name}.eval_sets", eval_set, table.eval_sets)
    if (claim.relation == "at_least_share") != (claim.share is not None):
        raise ConfigError(f"claims.{name}.share is {claim.share}; expected a number with at_least_share, else none.")


def check_objective(name: str, method: MethodEntry) -> None:
    """methods.<name>.objective against the JSON Schema of its module, without importing torch.

    A module from elsewhere has no schema here; its Config checks the values when the job starts.
    """
    path = SCHEMA_DIR / "methods" / f"{method.module}.json"
    if not path.exists():
        if method.module.split(".")[0] in ("pso", "baselines"):
            raise ConfigError(
                f"methods.{name}.module is {_value(method.module)}, which has no schema; is the name right? "
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
    raise ConfigError(f"{field} is {_value(error.instance)}; expected {expected}.")


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


def import_module(dotted: str, field: str):
    """The module at a dotted path, or the object in it after a colon, or a sentence that names the field."""
    path, _, attribute = dotted.partition(":")
    try:
        module = importlib.import_module(path)
        return getattr(module, attribute) if attribute else module
    except ModuleNotFoundError as error:
        raise ConfigError(f"{field} is {_value(dotted)}, but there is no module {error.name!r}.") from None
    except AttributeError:
        raise ConfigError(f"{field} is {_value(dotted)}, but {path} has no {attribute!r}.") from None


# ---- command line ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config-dir and --set, which every job takes."""
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR, help="folder with the YAML files")
    overrides = os.environ.get(SETTINGS_VARIABLE, "{}")  # how Snakemake hands its config to jobs
    parser.add_argument(
        "--set", type=json.loads, default=json.loads(overrides), metavar="JSON", help='overrides, as {"scale": "smoke"}'
    )


def job_environment(settings: dict) -> dict[str, str]:
    """What the workflow puts into the environment of its jobs; a variable that is set already wins.

    One thread per process: two torch processes with two threads each on two cores are 5 to 20 times
    slower. The allocator settings keep glibc from giving memory back between steps.
    """
    defaults = {
        "OMP_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "MALLOC_MMAP_THRESHOLD_": "100000000000",
        "MALLOC_TOP_PAD_": "536870912",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # every file comes from the stand-in hub
        "MPLBACKEND": "Agg",
    }
    paths = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {**defaults, **os.environ, "PYTHONPATH": paths, SETTINGS_VARIABLE: json.dumps(settings)}


def from_arguments(args: argparse.Namespace) -> Config:
    return load(args.set, args.config_dir)


def schemas() -> dict[str, dict]:
    """Relative path in workflow/schemas -> JSON Schema. Imports the method modules (and torch)."""
    result = {}
    for kind, model in ENTRIES.items():
        entry = model.model_json_schema()
        definitions = entry.pop("$defs", {})
        result[f"{kind}.json"] = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "additionalProperties": entry,
            "$defs": definitions,
        }
    for kind, name in sorted(_shipped_methods()):
        module = importlib.import_module(f"{kind}.{name}")
        result[f"methods/{kind}.{name}.json"] = module.Config.model_json_schema()
    return result


def _shipped_methods() -> list[tuple[str, str]]:
    """(package, module) of every file that defines `loss` and `Config`."""
    found = []
    for package in ("pso", "baselines"):
        for path in (ROOT / package).glob("*.py"):
            text = path.read_text()
            if "\ndef loss(" in text and "\nclass Config(" in text:
                found.append((package, path.stem))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="check workflow/config, or write its JSON Schemas")
    add_arguments(parser)
    parser.add_argument("--write-schemas", action="store_true")
    args = parser.parse_args()
    if args.write_schemas:
        for name, schema in schemas().items():
            path = SCHEMA_DIR / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(schema, indent=2) + "\n")
        return
    try:
        config = from_arguments(args)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(
        f"scale {config.scale}: {len(config.models)} models, {len(config.methods)} methods, "
        f"{len(config.table_entries)} tables, {len(config.claims)} claims; all well formed"
    )


if __name__ == "__main__":
    main()
