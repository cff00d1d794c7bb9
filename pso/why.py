"""Which key made a run stale: its run.json against the configuration, the code and the files of now. Torch-free.

python -m pso.doctor --why results/paper/preference/sdxl_dmd2/pso_offline/seed0
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pso.entries import Config
from pso.hub import Hub, is_outside, name_of
from pso.params import kept_params, run_modules
from pso.paths import RESULTS, scale_dir
from pso.provenance import UserError, fingerprints, sha256_of, versions
from pso.steps import metric_repositories, model_repositories

ABSENT = object()
GROUPS = ("Settings", "Code", "Inputs")  # what makes a run stale


def changes(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """`path: old -> new` of every leaf that differs, added and removed ones too. Lists are leaves."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from changes(before.get(key, ABSENT), now.get(key, ABSENT), f"{path}.{key}" if path else str(key))
    elif before is ABSENT:
        yield f"`{path}`: added, {json.dumps(now)}"
    elif now is ABSENT:
        yield f"`{path}`: removed, was {json.dumps(before)}"
    elif before != now:
        yield f"`{path}: {json.dumps(before)} -> {json.dumps(now)}`"


def read(run: Path) -> dict:
    """The run.json of a run's folder, or of itself."""
    path = run if run.suffix == ".json" else run / "run.json"
    told = "expected a run's folder, such as results/paper/preference/sdxl_dmd2/pso_offline/seed0."
    if not path.exists():
        state = " (it is not finished: it has a state/ and no run.json)" if (run / "state").is_dir() else ""
        raise UserError(f"{run} holds no run.json{state}; {told}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); run the workflow again, which makes the run anew.") from None
    if not isinstance(content, dict) or content.get("job") != "tune":
        raise UserError(f"{path} is not the record of a tuning run; {told}")
    if not {"params", "modules"} <= content.keys():
        raise UserError(
            f"{path} is of an earlier version of this project, which kept neither `params` nor `modules`; "
            "`snakemake -n` says whether the run is made anew."
        )
    return content


def identity(record: dict) -> dict[str, str]:
    """Scale, model and method of a record."""
    asked = record["config"]
    return {"scale": asked["scale"], "model": next(iter(asked["model"])), "method": next(iter(asked["method"]))}


def settings(record: dict, config: Config) -> list[str]:
    """Keys that differ; a model or method that is no more is one of them."""
    who, known = identity(record), {"model": config.models, "method": config.methods}
    gone = [f"`{kind}s.{who[kind]}`: removed" for kind, names in known.items() if who[kind] not in names]
    if gone:
        return gone
    now = json.loads(json.dumps(kept_params(config, who["model"], who["method"])))  # keys become texts
    return list(changes(record["params"], now))


def code(record: dict, config: Config) -> list[str]:
    """Modules whose code differs, by name."""
    method = identity(record)["method"]
    if method not in config.methods:
        return []
    before, now = record["modules"], fingerprints(*run_modules(config, method))
    found = []
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            found.append(f"`{name}`: no longer used")
        elif name not in before:
            found.append(f"`{name}`: newly used")
        elif before[name] != now[name]:
            found.append(f"`{name}`: its code changed")
    return found


def inputs(record: dict, config: Config, root: Path) -> tuple[list[str], list[str]]:
    """Files that are no longer what was read, and those that cannot be looked up; root: the scale's folder."""
    hub, own = Hub(root / "hub"), _own_folders(record, config)
    found, unseen = [], []
    for entry in record["inputs"]:
        repo, name = entry.get("repo"), entry["file"]
        folders = [root] if repo is None else own.get(repo, [root / "hub" / repo])
        shown = name if repo is None else f"{repo}: {name}"
        if name.endswith(" pictures"):
            unseen.append(f"`{shown}`, kept by a digest of all together")
        elif not (paths := [folder / name for folder in folders if (folder / name).is_file()]):
            found.append(f"`{shown}`: missing")
        elif entry["sha256"] not in (now := [_digest(hub, repo, name, path) for path in paths]) and not _only_grown(
            paths[0], entry
        ):
            found.append(f"`{shown}`: sha256 {entry['sha256'][:12]} -> {now[0][:12]}")
    return found, unseen


def _own_folders(record: dict, config: Config) -> dict[str, list[Path]]:
    """Folders of the user's own by the name that inputs tell of them, which two may share."""
    who, found = identity(record), {}
    repos = [entry.repo for entry in config.datasets.values()]
    repos += model_repositories(config, who["model"]) if who["model"] in config.models else []
    judges = config.methods[who["method"]].metrics if who["method"] in config.methods else []
    repos += [repo for name in judges for repo in metric_repositories(config, name)]
    for repo in filter(is_outside, dict.fromkeys(repos)):
        found.setdefault(name_of(repo), []).append(Path(repo))
    return found


def _digest(hub: Hub, repo: str | None, name: str, path: Path) -> str:
    """Of a fetched file that was not written since what was checked then: Pick-a-Pic's are 335 GB."""
    return sha256_of(path) if repo is None else hub.told(repo, name, path)["sha256"]


def _only_grown(path: Path, entry: dict) -> bool:
    """Whether a cache is made from the same as before: pairs of other runs were added (pso/caches.py)."""
    before, tell = entry.get("made_from"), path.with_suffix(".json")
    return before is not None and tell.is_file() and json.loads(tell.read_text()).get("made_from") == before


def text(config: Config, run: Path, results: Path = RESULTS) -> str:
    """What changed since a run was made, in Markdown."""
    run = Path(run)
    record = read(run)
    who = identity(record)
    if who["scale"] != config.scale:
        raise UserError(
            f"{run} is of the scale {who['scale']}, the configuration's is {config.scale}; ask again with "
            f"""--set '{{"scale": "{who["scale"]}"}}'."""
        )
    changed, unseen = inputs(record, config, scale_dir(config.scale, results))
    groups = dict(zip(GROUPS, (settings(record, config), code(record, config), changed), strict=True))
    stale = sum(map(len, groups.values()))
    verdict = f"{stale} change{'s' if stale != 1 else ''} since it was made: it is stale."
    parts = [f"**{who['model']} {who['method']}, scale {config.scale}**: {verdict if stale else 'nothing changed.'}"]
    parts += [_listed(f"{name} that changed", lines) for name, lines in groups.items() if lines]
    if unseen:
        parts.append(_listed("Not looked at", unseen))
    if other := list(changes(record["versions"], versions())):
        parts.append(_listed("Other versions of packages, which are no reason to run it again", other))
    return "\n\n".join(parts) + "\n"


def _listed(title: str, lines: list[str]) -> str:
    return f"{title}:\n\n" + "\n".join(f"- {one}" for one in lines)
