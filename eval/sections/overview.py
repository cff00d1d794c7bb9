"""What was run and what came out, in a few lines, and how the rest is to be read. No torch."""

from eval.claims import is_false
from eval.scores import table_entry
from eval.sections import claims, tables
from eval.sections.page import Context, render
from pso.entries import UNTUNED, Config, Row
from pso.paths import reference_file

TITLE = "Overview"
WEIGHTS = {
    "standin": "stand-ins, trained from nothing by the workflow on a procedural captioned world",
    "random": "full-size networks with random weights: nothing that they draw means anything",
    "fetched": "the published ones",
}


def section(context: Context) -> str:
    config = context.config
    diffs = {name: found for name in config.tables if (found := context.diff(name)) is not None}
    judged = context.json("claims.json") if context.has("claims.json") else None
    return render(
        "overview.html",
        facts=_facts(context),
        directions=_directions(diffs),
        in_paper=any(reference_file(name).exists() for name in config.tables),
        comparable=any(found["comparable"] for found in diffs.values()),
        cells={name: found["cell_counts"] for name, found in diffs.items()},
        claims=claims.verdict_counts(judged) if judged is not None else None,
        claim_kinds=claims.KINDS,
        plural=claims.PLURAL,
        num_claims=len(judged or []),
        unmeasured=claims.num_unmeasured(judged or []),
        num_false=sum(map(is_false, judged or [])),
    )


def _directions(diffs: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Table -> directions by mark."""
    return {name: tables.agreement(found) for name, found in diffs.items()}


def _facts(context: Context) -> dict[str, str]:
    config = context.config
    rows = [(table_entry(config, name), row) for name in config.tables for row in table_entry(config, name).shown_rows]
    tuned = [row for _, row in rows if row.method != UNTUNED]
    facts = {
        "weights and data": WEIGHTS[config.scale_entry.hub],
        "models that were tuned": ", ".join(_models(config, tuned)) or "none",
        "methods": ", ".join(dict.fromkeys(config.methods[row.method].title for row in tuned)) or "none",
        "training seeds": ", ".join(map(str, config.seeds)),
    }
    facts["evaluation"] = "; ".join(dict.fromkeys(_eval_sets(context)))
    return facts | {"machines": machines(context)}


def _models(config: Config, rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(config.models[row.model].title for row in rows))


def _eval_sets(context: Context) -> list[str]:
    """`24 prompts of pickapic_test, 12 images each`, as the tables' files have it."""
    found = []
    for name in context.config.tables:
        if not context.has(f"tables/{name}.csv"):
            continue
        for eval_set, lines in context.table(name).groupby("eval_set", sort=False):
            prompts = lines["num_prompts"].max()
            if prompts == prompts and prompts:  # NaN where nothing was measured
                each = (lines["num_images"] / lines["num_runs"]).max() / prompts
                found.append(f"{prompts:.0f} prompts of {eval_set}, {each:g} image{'s' if each != 1 else ''} each")
    return found


def machines(context: Context) -> str:
    """Whether a GPU took part."""
    if not context.records:
        return "not known: no job has left its record here"
    gpus = [name for record in context.records.values() for name in record["hardware"].get("gpus", [])]
    if not gpus:
        return f"CPU cores alone; nothing ran on a GPU ({len(context.records)} jobs)"
    with_gpu = sum(bool(record["hardware"].get("gpus")) for record in context.records.values())
    return f"{', '.join(dict.fromkeys(gpus))} ({with_gpu} of {len(context.records)} jobs saw a GPU)"
