"""Measured results of the method pages, docs/methods/{method}.md, written by `make readme` with README's numbers.

Between `<!-- measured:begin -->` and its end: every row of the miniature's tables that the method trained, against the
untuned model with the same sampler and number of steps, and what became of the claims about these rows. No torch.
"""

import json
from pathlib import Path

import pandas as pd

from eval.claims import FAILS, HOLDS, INCONCLUSIVE
from eval.scores import metric_title
from eval.tables import digits, scale_sentence
from pso.entries import UNTUNED, Config, Row, TableEntry
from pso.provenance import ROOT

FOLDER = ROOT / "docs" / "methods"
HOW = (
    "Each number is the row's mean minus that of the untuned model, sampled with as many steps on the same prompts and "
    "noises; in brackets the 95 % interval of the difference, over prompts. *As the paper*: directions of the paper's "
    "columns that agree with the paper's, that disagree, that are open."
)
VERDICTS = ("agrees", "disagrees", "inconclusive")  # of {table}.diff.json
BARE = (
    "No interval of the difference is kept for rows or columns that the paper does not have, nor for a row that it "
    "holds against another model: their means alone."
)


def modules(config: Config) -> list[str]:
    """Dotted paths of all methods that have an entry."""
    return sorted({entry.module for entry in config.methods.values()})


def page_of(module: str, folder: Path = FOLDER) -> Path:
    return folder / f"{module.rpartition('.')[2]}.md"


def trained(config: Config, module: str, table: TableEntry) -> list[Row]:
    """Rows that a module trained."""
    return [r for r in table.shown_rows if r.method != UNTUNED and config.methods[r.method].module == module]


def signed(value: float, interval: list[float] | None, places: int) -> str:
    if interval is None:
        return f"{value:+z.{places}f}"
    places = digits(places, interval)
    return f"{value:+z.{places}f} [{', '.join(f'{bound:+z.{places}f}' for bound in interval)}]"


def differences(config: Config, base: Path, name: str, module: str) -> str:
    """One table's rows of the method against their untuned model; empty if it has none."""
    table = config.table_entries[name]
    rows = trained(config, module, table)
    if not rows:
        return ""
    frame = pd.read_csv(base / "tables" / f"{name}.csv").set_index(["eval_set", "label"])
    compared = base / "tables" / f"{name}.diff.json"
    found = json.loads(compared.read_text())["directions"] if compared.exists() else []
    known = {(d["eval_set"], d["label"], d["base"], d["metric"]): d for d in found if d.get("interval")}
    metrics = [m for m in [*table.metrics, *shown_extras(table)] if m in frame and frame[m].notna().any()]
    lines, alone = [], []
    for row in rows:
        untuned = table.untuned_of(row)
        if untuned is None:
            alone.append(row.label)
            continue
        for eval_set in table.eval_sets:
            line = {"row": row.label, "against": untuned.label, "prompts of": eval_set, "as the paper": ""}
            pairs = {m: p for m in metrics if (p := known.get((eval_set, row.label, untuned.label, m)))}
            if pairs:
                verdicts = [pair["verdict"] for pair in pairs.values()]
                line["as the paper"] = " / ".join(str(verdicts.count(verdict)) for verdict in VERDICTS)
            for metric in metrics:
                mean = [frame.at[(eval_set, label), metric] for label in (row.label, untuned.label)]
                value, interval = mean[0] - mean[1], None
                if metric in pairs:
                    value, interval = pairs[metric]["difference"], pairs[metric]["interval"]
                line[metric_title(config, metric)] = signed(value, interval, config.metrics[metric].decimals)
            lines.append(line)
    parts = [f"**{name}.** {table.caption}"]
    if lines:
        align = ("left", "left", "left", "left", *["right"] * len(metrics))
        parts.append(pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True, colalign=align))
    if alone:
        parts.append(f"Left out, because the table has no untuned row of their model and steps: {', '.join(alone)}.")
    return "\n\n".join(parts)


def shown_extras(table: TableEntry) -> list[str]:
    """Of the columns that the paper lacks: what tells blur, what tells loss of the prompt, the style's own."""
    return [m for m in table.extra_metrics if m in ("style", "oracle_accuracy", "sharpness", "diversity")]


def claims_about(config: Config, base: Path, module: str) -> str:
    labels = {
        (name, row.label) for name, table in config.table_entries.items() for row in trained(config, module, table)
    }
    claims = json.loads((base / "claims.json").read_text())
    about = [c for c in claims if {(c["table"], c["left"]), (c["table"], c["right"])} & labels]
    if not about:
        return "No claim of the paper is about this method."
    counts = ", ".join(f"{sum(c['verdict'] == v for c in about)} {v}" for v in (HOLDS, FAILS, INCONCLUSIVE))
    lines = [{"verdict": c["verdict"], "claim": c["text"], "by": by(config, c)} for c in about]
    told = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    how = "By: difference or share, with its 95 % interval; a verdict needs Holm's p below 0.05 too."
    return f"**Claims of the paper about it:** {counts}. {how}\n\n{told}"


def by(config: Config, claim: dict) -> str:
    if claim["reason"]:
        return claim["reason"]
    if claim["relation"] == "at_least_share":
        low, high = claim["interval"]
        return f"{claim['estimate']:.3f} [{low:.3f}, {high:.3f}]"
    return signed(claim["estimate"], claim["interval"], config.metrics[claim["metric"]].decimals)


def measured(config: Config, base: Path, module: str) -> str:
    """The text between a page's markers."""
    tables = [differences(config, base, name, module) for name in config.tables]
    shown = [text for text in tables if text]
    if not shown:
        return f"{scale_sentence(config)}\n\nNo row of {', '.join(config.tables)} is trained by it."
    head = " ".join([scale_sentence(config), HOW, BARE])
    return "\n\n".join([head, *shown, claims_about(config, base, module)])


def pages(config: Config, base: Path) -> dict[Path, dict[str, str]]:
    """Page -> marker -> text, for `eval.readme.fill`."""
    return {page_of(module): {"measured": measured(config, base, module)} for module in modules(config)}
