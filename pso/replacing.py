"""How a user's settings would name one repository in place of another. Torch-free."""

import json
from typing import Any

from pso.entries import PATHS, Config

NAMED_IN = ("datasets", "models", "metrics")


def replacement(config: Config, old: str, new: str) -> list[str]:
    """Settings for Snakemake's --config, such as datasets={pickapic_v2: {repo: owner/copy}}: all places with `old`."""
    found = []
    for kind in NAMED_IN:
        entries = {name: entry.model_dump(mode="json", context=PATHS) for name, entry in getattr(config, kind).items()}
        changed = _changed(entries, old, new)
        if changed is not None:
            found.append(f"{kind}={_flow(changed)}")
    return found


def _changed(value: Any, old: str, new: str) -> Any:
    """The part of a value that the replacement changes; a list is given whole, as settings replace it whole."""
    if isinstance(value, dict):
        changed = {key: _changed(inner, old, new) for key, inner in value.items()}
        return {key: inner for key, inner in changed.items() if inner is not None} or None
    if isinstance(value, list):
        changed = [_changed(inner, old, new) for inner in value]
        return None if all(c is None for c in changed) else [_whole(inner, old, new) for inner in value]
    return new if value == old else None


def _whole(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _whole(inner, old, new) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_whole(inner, old, new) for inner in value]
    return new if value == old else value


def _flow(value: Any) -> str:
    """YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)
