"""Where every number comes from: code, versions, machines, seeds, scorers, weights and data, and what was left out.

From the records of the jobs (run.json, images.json, scores.json ...) and the metadata of the score files. No torch.
"""

import json
from collections import Counter
from collections.abc import Iterable

import pyarrow.parquet as pq

from eval.run_notes import NO_FAULT
from eval.scores import METADATA_KEY, metric_title
from eval.sections.page import Context, render
from pso.paths import root_of
from pso.provenance import UserError, digest
from pso.runs import jobs, metrics

TITLE = "Provenance"
SHORT = 12  # digits of a sha256 that are shown


def section(context: Context) -> str:
    records = context.records
    scorers, dropped = score_files(context)
    tuned = {job: record for job, record in records.items() if record["job"] == "tune"}
    return render(
        "provenance.html",
        jobs=len(records),
        lost=context.lost_records,
        code=_code(records),
        versions=_versions(records),
        hardware=_counted(record["hardware"] for record in records.values()),
        numerics=_counted(record["numerics"] for record in tuned.values()),
        seeds=_seeds(context),
        scorers=scorers,
        dropped_images=dropped,
        runs=[_run(job, record) for job, record in tuned.items()],
        pictures=_pictures(records),
        inputs=inputs(records),
        digests=[(job, record["config_digest"]) for job, record in records.items()],
    )


def _code(records: dict[str, dict]) -> list[dict]:
    """Each state of the code with the jobs that it ran."""
    found = Counter((record["code"]["commit"], record["code"]["dirty"]) for record in records.values())
    return [{"commit": commit, "dirty": dirty, "jobs": count} for (commit, dirty), count in found.items()]


def _versions(records: dict[str, dict]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for record in records.values():
        for package, version in record["versions"].items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    return found


def _counted(entries: Iterable[dict]) -> list[dict]:
    """Each different entry as flat facts, with the number of jobs it holds for."""
    number = Counter(json.dumps(entry) for entry in entries)
    return [{"facts": flat(json.loads(text)), "jobs": count} for text, count in number.items()]


def flat(entry: dict, above: str = "") -> dict[str, str]:
    """{"a": {"b": [1, 2]}} as {"a.b": "1, 2"}."""
    found = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = ", ".join(map(_word, value)) if isinstance(value, list) else _word(value)
    return found


def _word(value) -> str:
    return {True: "yes", False: "no", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)


def _seeds(context: Context) -> dict[str, str]:
    config = context.config
    sets = dict.fromkeys(name for table in config.tables for name in config.table_entries[table].eval_sets)
    noises = {config.datasets[name].num_seeds for name in sets if name in config.datasets}
    return {
        "training": ", ".join(map(str, config.seeds)),
        "noise of images, and the bootstrap": str(config.scale_entry.eval_seed),
        "what the workflow trains beside the rows": str(config.scale_entry.seed),
        "noises per prompt": " or ".join(map(str, sorted(noises))) or "as the data set says",
        "resamples of an interval": f"{config.scale_entry.bootstrap_resamples:,}",
    }


def score_files(context: Context) -> tuple[list[dict], list[dict]]:
    """Every scorer with the number of files that it wrote, and images that have no score."""
    config, found, dropped = context.config, {}, []
    for job in jobs(config):
        for metric in metrics(config, root_of(job.task)):
            path = job.scores(config.scale, metric, context.results)
            if not path.exists():  # a column may exist in another table of the task only; eval.tables says what lacks
                continue
            told = json.loads((pq.read_schema(path).metadata or {}).get(METADATA_KEY.encode(), b"{}"))
            if "spec" not in told:
                raise UserError(f"{path} does not say which scorer wrote it; delete it and score again.")
            one = found.setdefault((metric, digest(told["spec"])), {"spec": told["spec"], "files": 0, "images": 0})
            one["files"] += 1
            one["images"] += told["num_images"]
            where = f"{job.task}/{job.model}/{job.method}/seed{job.seed}, {job.eval_set}, {job.steps} steps"
            dropped += [(metric, where, why, count) for why, count in told.get("dropped", {}).items() if count]
    titles = [{"title": metric_title(config, metric), "digest": of, **one} for (metric, of), one in found.items()]
    for one in titles:
        spec = one.pop("spec")
        one["is"] = flat({key: value for key, value in spec.items() if key not in ("files", "metric")})
        one["read"] = {name: sha[:SHORT] for name, sha in sorted(spec.get("files", {}).items())}
    return titles, dropped


def _run(job: str, record: dict) -> dict:
    """What a run was trained on, and what of it could not be used."""
    data = record["data"]
    reasons = {reason: count for reason, count in data.get("dropped", {}).items() if count}
    steps = record["steps"]
    return {
        "job": job.removesuffix("/run"),
        "data": ", ".join(
            f"{value:,} {key.replace('_', ' ')}" for key, value in data.items() if isinstance(value, int)
        ),
        "by_design": reasons.pop(NO_FAULT, 0),
        "dropped": ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in reasons.items()),
        "updates": f"{steps['done']:,} of {steps['planned']:,}",
        "resumed": len(record["resumed_at"]),
        "processes": record["processes"],
    }


def _pictures(records: dict[str, dict]) -> list[dict]:
    """Every set of pictures with its shards."""
    found = []
    for record in records.values():
        for one in record.get("images", []) if record["job"] == "generate" else []:
            run = f"{one['task']}/{one['model']}/{one['method']}/seed{one['seed']}"
            where = f"{run}, {one['eval_set']}, {one['steps']} steps"
            shards = [shard["sha256"][:SHORT] for shard in one["shards"]]
            count = sum(shard["images"] for shard in one["shards"])
            found.append({"where": where, "images": count, "shards": shards})
    return found


def inputs(records: dict[str, dict]) -> dict[str, list[dict]]:
    """Repository, or `made here` -> its files that were read: sha256, revision, and by how many jobs."""
    number = Counter()
    for record in records.values():
        for one in record["inputs"]:
            of = one.get("repo") or "made here"
            number[of, one["file"], one["sha256"], one.get("revision") or ""] += 1
    found: dict[str, list[dict]] = {}
    for (of, file, sha, revision), count in sorted(number.items()):
        found.setdefault(of, []).append({"file": file, "sha": sha[:SHORT], "revision": revision, "jobs": count})
    return found
