"""How far a campaign is: every run that the tables need, its images and its scores. From any shell, at any time.

    python -m pso.progress --set '{"scale": "paper"}'    or: python -m pso.doctor --progress

It only reads, takes no lock, and bears files that are half written, appear or vanish meanwhile. Torch-free. How far a
run is and what it took is told by its timeline.jsonl, its last numbers by train.jsonl, time left by its own updates;
where nothing was measured yet by the estimate, times what runs took against theirs so far.
"""

import argparse
import json
import math
import os
import time
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

from tabulate import tabulate

from pso import campaign
from pso.campaign import Run
from pso.config import add_arguments, from_arguments
from pso.entries import Config
from pso.estimate import all_calls
from pso.hub import hub_dir
from pso.paths import RESULTS, manifest, model_dir, root_of, run_dir, scale_dir
from pso.provenance import sentences
from pso.resources import Needs
from pso.runs import Job, jobs, metrics, not_comparable
from pso.steps import Steps, slug
from pso.timeline import NAME, parsed, read

SILENT_S, SILENT_UPDATES = 600.0, 5.0  # without a line for longer than both: a round of sampling writes none
SHARD_BLOCKS = 8  # batches in a shard, as in eval/generate.py
TAIL_BYTES = 2**18
SHOWN = ("loss", "margin", "implicit_accuracy")
STATES = ("running", "silent", "stopped", "waiting", "done")


# ---- files that others write ----


def read_json(path: Path) -> dict | None:
    """A JSON file; none if it is not there, or not whole."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def last_lines(path: Path) -> dict[str, dict]:
    """The last whole line of train.jsonl of each event, "update" and "probe", as far as there is one."""
    for size in (TAIL_BYTES, None):
        found: dict[str, dict] = {}
        for line in reversed(_end(path, size)):
            entry = parsed(line) or {}
            if entry.get("event") in ("update", "probe") and _number(entry.get("update")) is not None:
                found.setdefault(entry["event"], entry)
                if len(found) == 2:
                    return found
    return found


def _end(path: Path, size: int | None) -> list[bytes]:
    try:
        with open(path, "rb") as file:
            if size is not None:
                file.seek(max(file.seek(0, os.SEEK_END) - size, 0))
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def _number(value) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()


# ---- one run ----


def sessions(lines: list[dict]) -> list[list[dict]]:
    """From one start of a run to the line before the next."""
    found: list[list[dict]] = []
    for line in lines:
        if line["event"] == "began" or not found:
            found.append([])
        found[-1].append(line)
    return found


def seconds_each(found: list[list[dict]]) -> float | None:
    """Of an update, in the last session that made one."""
    for session in reversed(found):
        first, last = session[0], session[-1]
        if last["update"] > first["update"]:
            return max(last["time"] - first["time"], 0.0) / (last["update"] - first["update"])
    return None


def state_of(lines: list[dict], whole: bool, each: float | None, now: float) -> str:
    """`whole`: its run.json is there. What has written nothing for long is silent; whether it lives is not known."""
    last = lines[-1] if lines else None
    if last is None or last["event"] == "ended":
        return "done" if whole else "waiting"
    if last["event"] == "stopped":
        return "stopped"
    return "silent" if now - last["time"] > max(SILENT_S, SILENT_UPDATES * (each or 0)) else "running"


def spent(found: list[list[dict]], record: dict | None, until: float | None) -> dict:
    """Hours of GPUs, or of processes without one. until: of a session that goes on."""
    if not found:  # made before there was a timeline
        told = {"cost": {"wall_s": 0.0}, "hardware": {}} if record is None else record
        return {"hours": told["cost"]["wall_s"] / 3600, "gpus": "gpus" in told["hardware"]}
    hours, gpus = 0.0, 0
    for session in found:
        first, last = session[0], session[-1]
        gpus = max(gpus, first.get("gpus", 0))
        end = until if until is not None and session is found[-1] else last["time"]
        each = first.get("gpus") or first.get("processes", 1)
        hours += max(end - first.get("started", first["time"]), 0.0) / 3600 * each
    return {"hours": hours, "gpus": gpus > 0}


def told(needs: Needs, run: Run, results: Path, now: float) -> dict:
    """Everything about one run."""
    config, job = needs.config, f"{run.task} {run.model} {run.method} seed{run.seed}"
    folder = run_dir(config.scale, run.task, run.model, run.method, run.seed, results)
    lines, record = read(folder / NAME), read_json(folder / "run.json")
    found, planned = sessions(lines), config.methods[run.method].tune.num_updates
    each = seconds_each(found)
    state = state_of(lines, record is not None, each, now)
    logged = last_lines(folder / "train.jsonl") if state != "waiting" else {}
    done = {"waiting": 0, "done": planned}.get(state)
    if done is None:
        done = min(max(logged.get("update", {}).get("update", 0), lines[-1]["update"]), planned)
    hours = spent(found, record, now if state == "running" else None)
    item = needs.work("tune", job)
    estimated = needs.speed.hours(needs.flops.total(all_calls([item]))) if needs.full and not item.uncounted else None
    return {
        "run": asdict(run),
        "state": state,
        "since": lines[-1]["time"] if lines else None,
        "why": lines[-1].get("why") if state == "stopped" else None,
        "updates": done,
        "planned": planned,
        "seconds_per_update": each,
        "left_s": None,
        **{name: _number(logged.get("update", {}).get(name)) for name in SHOWN},
        "reward": _number(logged.get("probe", {}).get("reward")),
        "retries": max(sum(line["event"] == "began" for line in lines) - 1, 0),
        "hours": hours["hours"],
        "unit": "GPU-hours" if hours["gpus"] or needs.full else "CPU-hours",
        "estimated_hours": estimated,
        "expected_s": needs.seconds("tune", job),
    }


def standing_for_others(config: Config, results: Path) -> list[Run]:
    """Runs of a stand-in hub under the names of checkpoints that others published, if a table's model needs them."""
    steps = Steps(config, results)
    wanted = {path for model in {job.model for job in jobs(config)} for path in steps.model(model)}
    found = [run for name, run in steps.published.items() if {*steps.named(f"published_{name}")} & wanted]
    return [Run("published", run.model, run.method, 0) for run in found]


def with_time_left(rows: list[dict]) -> float | None:
    """Fills in what each run still takes. What updates took against what was expected, where some were made."""
    known = [row for row in rows if row["seconds_per_update"] is not None]
    expected = sum(row["expected_s"] for row in known)
    factor = sum(row["seconds_per_update"] * row["planned"] for row in known) / expected if expected else None
    for row in rows:
        each = row["seconds_per_update"]
        if each is None:
            each = (1.0 if factor is None else factor) * row["expected_s"] / row["planned"]
        row["left_s"] = each * (row["planned"] - row["updates"])
    return factor


# ---- images, scores, and what comes before ----


def pictures(needs: Needs, task: str, model: str, results: Path) -> dict:
    """Shards and score files of all rows of a model and task."""
    config = needs.config
    these, folder = jobs(config, model, task), model_dir(config.scale, task, model, results)
    counted, shown, names = Counter(), set(these), metrics(config, task)
    listed = listed_shards(folder)
    for job in these:
        wanted = math.ceil(campaign.images_of(config, job) / config.scale_entry.eval_batch / SHARD_BLOCKS)
        wanted = listed.get(tuple(asdict(job).values()), wanted)
        there = names_in(job.images(config.scale, results))
        counted["shards"] += wanted
        counted["shards_there"] += sum(f"shard{k}.parquet" in there for k in range(wanted))
        files = [m for m in names if not not_comparable(config, m, job, shown)]
        there = names_in(job.scores(config.scale, "any", results).parent)
        counted["scores"] += len(files)
        counted["scores_there"] += sum(f"{m}.parquet" in there for m in files)
    found = {key: counted[key] for key in ("shards_there", "shards", "scores_there", "scores")}
    lacking = [1 - found[f"{key}_there"] / max(found[key], 1) for key in ("shards", "scores")]
    left = [
        share * needs.seconds(r, f"{task} {model}") for share, r in zip(lacking, ("generate", "score"), strict=True)
    ]
    return {"task": task, "model": model, **found, "left_s": sum(left)}


def listed_shards(folder: Path) -> dict[tuple, int]:
    """The number of shards of every row that images.json lists, by its job."""
    content = read_json(manifest(folder, "images"))
    names = [field.name for field in fields(Job)]
    return {} if content is None else {tuple(e[name] for name in names): len(e["shards"]) for e in content["images"]}


def before(needs: Needs, results: Path) -> list[dict]:
    """Downloads, caches and judges, by rule: how many are there, and the time of the others."""
    base, hub = scale_dir(needs.config.scale, results), hub_dir(needs.config.scale, results)
    files = {
        "fetch": lambda name: hub / "repositories" / f"{slug(name)}.json",
        "latents": lambda name: (base / "cache" / name.replace(" ", "/")).with_suffix(".json"),
        "texts": lambda name: base / "cache" / "texts" / f"{name}.json",
        "embeddings": lambda name: (base / "cache" / name.replace(" ", "/")).with_suffix(".json"),
        "preference_model": lambda name: hub / f"preference_model_{name}.json",
    }
    found = []
    for rule, file in files.items():
        names = [name for of, name in needs.works if of == rule]
        lacking = [name for name in names if not file(name).exists()]
        left = sum(needs.seconds(rule, name) for name in lacking)
        if names:
            found.append({"rule": rule, "there": len(names) - len(lacking), "wanted": len(names), "left_s": left})
    return found


# ---- the whole ----


def progress(config: Config, results: Path = RESULTS, now: float | None = None) -> dict:
    now, needs = time.time() if now is None else now, Needs(config)
    runs = [*standing_for_others(config, results), *campaign.runs(config)]
    rows = [told(needs, run, results, now) for run in runs]
    factor = with_time_left(rows)
    shown = sorted({(root_of(job.task), job.model) for job in jobs(config)})
    images, earlier = [pictures(needs, *one, results) for one in shown], before(needs, results)
    left = {"tuning": sum(row["left_s"] for row in rows), "images and scores": sum(row["left_s"] for row in images)}
    left["downloads, caches and judges"] = sum(row["left_s"] for row in earlier)
    estimated = [row["estimated_hours"] for row in rows]
    return {
        "scale": config.scale,
        "tables": config.tables,
        "time": now,
        "runs": sorted(rows, key=lambda row: STATES.index(row["state"])),
        "images": images,
        "before": earlier,
        "states": {state: sum(row["state"] == state for row in rows) for state in STATES},
        "hours": sum(row["hours"] for row in rows),
        "estimated_hours": None if None in estimated else sum(estimated),
        "measured_against_expected": factor,
        "left_s": left,
    }


# ---- for people ----


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def _hours(hours: float) -> str:
    return f"{hours:.2f}" if hours >= 1 else f"{hours:.2g}"


def _cells(row: dict) -> list[str]:
    state = row["state"]
    if state == "silent":
        state += f" since {time.strftime('%d %b %H:%M', time.localtime(row['since']))}"
    each, hours = row["seconds_per_update"], _hours(row["hours"]) if row["hours"] else ""
    if row["estimated_hours"] is not None:
        hours += f" of {row['estimated_hours']:.2f}"
    numbers = [row[name] for name in (*SHOWN, "reward")]
    return [
        "{task} {model} {method} seed{seed}".format(**row["run"]),
        state,
        f"{row['updates']}/{row['planned']}",
        "" if each is None else f"{each:.3g}",
        duration(row["left_s"]) if row["left_s"] else "",
        *("" if number is None else f"{number:.4g}" for number in numbers),
        str(row["retries"] or ""),
        hours,
    ]


def _table(lines: list[list[str]], header: list[str], left: int) -> str:
    aligned = ("left",) * left + ("right",) * (len(header) - left)
    return tabulate(lines, header, "simple", disable_numparse=True, colalign=aligned if lines else None)


def as_text(found: dict) -> str:
    rows, images = found["runs"], found["images"]
    unit = next((row["unit"] for row in rows if row["hours"]), "hours")
    header = ["run", "state", "updates", "s each", "left", "loss", "margin", "accuracy", "reward", "retries", unit]
    parts = [_table([_cells(row) for row in rows], header, 2)]
    stopped = [row for row in rows if row["why"]]
    said = ["{task} {model} {method} seed{seed}".format(**row["run"]) + f" stopped: {row['why']}" for row in stopped]
    parts += ["\n".join(said)] if said else []
    lines = [
        [f"{row['task']} {row['model']}", f"{row['shards_there']}/{row['shards']}",
         f"{row['scores_there']}/{row['scores']}", duration(row["left_s"]) if row["left_s"] else ""]
        for row in images
    ]  # fmt: skip
    parts.append(_table(lines, ["images and scores", "shards", "score files", "left"], 1))
    return "\n\n".join([*parts, "\n".join(_sums(found, unit))]) + "\n"


def _sums(found: dict, unit: str) -> list[str]:
    rows, left = found["runs"], found["left_s"]
    counted = ", ".join(f"{count} {state}" for state, count in found["states"].items() if count)
    done, planned = (sum(row[key] for row in rows) for key in ("updates", "planned"))
    lines = [f"{found['scale']}: {len(rows)} runs, {counted or 'none'}; {done:,} of {planned:,} updates."]
    against = "" if found["estimated_hours"] is None else f", {found['estimated_hours']:.1f} estimated for all runs"
    lines.append(f"Spent on tuning: {_hours(found['hours'])} {unit}{against}.")
    if found["before"]:
        lines.append("There: " + ", ".join(f"{r['rule']} {r['there']}/{r['wanted']}" for r in found["before"]) + ".")
    each = ", ".join(f"{what} {duration(seconds)}" for what, seconds in left.items())
    factor = found["measured_against_expected"]
    measured = "" if factor is None else f"; updates took {factor:.2g} times what was expected"
    return [*lines, f"Left, one job after the other: {duration(sum(left.values()))} ({each}){measured}."]


def text(config: Config, results: Path = RESULTS) -> str:
    return as_text(progress(config, results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    with sentences("progress"):
        config = from_arguments(args)
        print(json.dumps(progress(config, args.results), indent=2) if args.json else text(config, args.results), end="")


if __name__ == "__main__":
    main()
