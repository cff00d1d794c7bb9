"""Reading workflow/config: files, overrides, the scale's deviations, and errors as one sentence.

Torch-free, so that `snakemake -n` starts in seconds. `python -m pso.config` checks the folder;
`--write-schemas` writes workflow/schemas/ from pso/entries.py and the methods' own Config classes.
What entries must have in common is in pso/checks.py.
"""

import argparse
import contextlib
import copy
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pso.checks import ROOT, SCHEMA_DIR, ConfigError, check_entries, shown, unknown_key
from pso.entries import COMMIT, ENTRIES, TOP_LEVEL, Config, ScaleEntry
from pso.provenance import UserError

CONFIG_DIR = ROOT / "workflow" / "config"
SETTINGS_VARIABLE = "PSO_BENCH_SETTINGS"
OFFLINE_VARIABLE = "PSO_BENCH_OFFLINE"  # what the user had said of the network, for the one job that may use it


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
    "less_than_equal": "a number of at most {le}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
}
PATTERNS = {COMMIT: "a commit, 7 to 40 of the digits 0-9 and a-f"}
A_NAME = "a name in small letters, digits and _"


def _known_keys(model: type[BaseModel] | None) -> list[str]:
    return sorted(model.model_fields) if model else []


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
    if kind == "string_pattern_mismatch":
        expected = PATTERNS.get(first["ctx"]["pattern"], A_NAME)
    else:
        expected = EXPECTED[kind].format(**first.get("ctx", {})) if kind in EXPECTED else first["msg"]
    extra = ""
    if kind in ("float_type", "int_type") and isinstance(value, str):
        with contextlib.suppress(ValueError):
            extra = f"; YAML reads it as text, write {_yaml_number(value, whole=kind == 'int_type')}"
    return ConfigError(f"{where} is {shown(value)}; expected {expected}{extra}.")


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
        raise ConfigError(f"config.scale is {shown(scale)}; expected one of {', '.join(raw['scales'])}.")
    scale_raw = raw["scales"][scale]
    check(ScaleEntry, scale_raw, f"scales.{scale}")

    entries = {}
    for kind, model in ENTRIES.items():
        entries[kind] = {n: check(model, entry, f"{kind}.{n}") for n, entry in raw[kind].items()}
        for name, override in (scale_raw.get(kind) or {}).items() if kind != "scales" else ():
            if name not in raw[kind]:
                raise unknown_key(f"scales.{scale}.{kind}", name, sorted(raw[kind]))
            own = entries_of.get(kind, {}).get(name, {})  # what the user asks for goes before the scale's deviation
            entry = merged(merged(raw[kind][name], override), own)
            entries[kind][name] = check(model, entry, f"scales.{scale}.{kind}.{name}")
    entries["methods"] = _within_budget(entries["methods"], entries["scales"][scale].budget)
    asked = top.get("tables")
    config = check(
        Config,
        {
            "seeds": top.get("seeds"),
            "tables": entries["scales"][scale].default_tables if asked is None else asked,
            "log_with": top.get("log_with", []),
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
    check_entries(config)
    return config


def _within_budget(methods: dict, budget: float) -> dict:
    """Methods with the scale's share of their updates, at least one."""
    if budget == 1:
        return methods
    fewer = {name: max(1, round(budget * method.tune.num_updates)) for name, method in methods.items()}
    return {
        name: m.model_copy(update={"tune": m.tune.model_copy(update={"num_updates": fewer[name]})})
        for name, m in methods.items()
    }


def import_module(dotted: str, field: str):
    """The module at a dotted path, or the object in it after a colon, or a sentence that names the field."""
    path, _, attribute = dotted.partition(":")
    try:
        module = importlib.import_module(path)
        return getattr(module, attribute) if attribute else module
    except ModuleNotFoundError as error:
        raise ConfigError(f"{field} is {shown(dotted)}, but there is no module {error.name!r}.") from None
    except AttributeError:
        raise ConfigError(f"{field} is {shown(dotted)}, but {path} has no {attribute!r}.") from None


# ---- command line ----


def published(kind: str, overrides: dict | None = None, folder: Path = CONFIG_DIR) -> dict:
    """Entries of a file with a user's overrides, for the published files: without any scale's deviations."""
    entries = merged(_read(Path(folder) / f"{kind}.yaml"), (overrides or {}).get(kind, {}))
    return {name: check(ENTRIES[kind], entry, f"{kind}.{name}") for name, entry in entries.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config-dir and --set, which every job takes."""
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR, help="folder with the YAML files")
    overrides = os.environ.get(SETTINGS_VARIABLE, "{}")  # how Snakemake hands its config to jobs
    parser.add_argument(
        "--set", type=json.loads, default=json.loads(overrides), metavar="JSON", help='overrides, as {"scale": "smoke"}'
    )


def job_environment(settings: dict) -> dict[str, str]:
    """What the workflow puts into the environment of its jobs; a variable that is set already wins.

    HF_HUB_OFFLINE alone is always set: every file comes from the hub folder, and no loader may look elsewhere. Only
    pso.fetch goes online, unless the user had said otherwise.

    One thread per process: two torch processes with two threads each on two cores are 5 to 20 times
    slower. The allocator settings keep glibc from giving memory back between steps.
    """
    defaults = {
        "OMP_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "MALLOC_MMAP_THRESHOLD_": "100000000000",
        "MALLOC_TOP_PAD_": "536870912",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
        OFFLINE_VARIABLE: "1" if users_offline() else "0",
    }
    paths = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    fixed = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, SETTINGS_VARIABLE: json.dumps(settings)}
    return {**defaults, **os.environ, **fixed}


def users_offline() -> bool:
    """Whether the user wants no network: as huggingface_hub reads it, before the workflow said it to its jobs."""
    ours, theirs = os.environ.get(OFFLINE_VARIABLE), ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    said = [ours] if ours is not None else [os.environ.get(name, "") for name in theirs]
    return any(value.upper() in {"1", "ON", "YES", "TRUE"} for value in said)


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
