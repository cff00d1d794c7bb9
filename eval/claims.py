"""The declared claims judged from paired scores: results/{scale}/claims.json, and the same as text. No torch.

A claim compares two rows on the same prompts and the same noise; its eval sets are pooled, every
prompt counts once. The estimate is left - right, or left / right for `at_least_share`, in the unit
that the tables print.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from eval.paper import FAILS as PAPER_FAILS
from eval.paper import bears_out, doubts
from eval.scores import (
    Scores,
    check_same_scorer,
    find_row,
    metric_title,
    pair,
    read_scores,
    units,
)
from eval.stats import Estimate, Undefined, holm, paired_difference, paired_ratio, smallest_p, win_rate
from eval.tables import digits, scale_sentence, unit
from pso import paths
from pso.config import add_arguments, from_arguments
from pso.entries import UNTUNED, ClaimEntry, Config, TableEntry
from pso.paths import reference_file
from pso.provenance import atomic, digest, sentences, write_json
from pso.runs import metric_missing
from pso.trained_on import trained_on

ALPHA = 0.05
HOLDS, FAILS, INCONCLUSIVE = "holds", "fails", "inconclusive"
HOW = """\
Each claim is one comparison of two rows on the same prompts and the same noise, averaged over the images of a prompt;
its eval sets are pooled. The interval is a 95 % bootstrap over prompts, p is a two-sided sign-flip test of the claim's
own bound, and Holm's p is adjusted for all declared claims (one that could not be measured counts with p = 1).
Training seeds are averaged; the interval does not cover their spread. Of a table with subjects a mean is that of the
subjects' means, and the bootstrap is over subjects where there are at least 10, else over prompts within them."""
RELATIONS = (
    ("relation", "estimate", "bound", "holds", "fails"),
    ("above", "left - right", "0", "interval above the bound", "interval below the bound"),
    ("below", "left - right", "0", "interval below the bound", "interval above the bound"),
    ("not_below", "left - right", "-margin", "interval above the bound", "interval below the bound"),
    ("at_least_share", "left / right", "share", "interval above the bound", "interval below the bound"),
)
BOTH = """\
Both also need Holm's p < 0.05; otherwise a claim is inconclusive. `paper's cells`: whether the paper's own printed
numbers say the same on every eval set of the claim (*holds*, *does not hold*, *equal*, *not printed*). They come
without intervals, so this is their direction and no more."""
FALSE_IN_PAPER = """\
Claims above whose direction the paper's printed numbers contradict on at least one eval set. Several read a sentence
that names no metric for each of the four metrics."""
DOUBTS = "Other notes on the paper's cells: its text against its tables, labels, misprints (eval/reference/README.md)."


def judge(claim: ClaimEntry, estimate: Estimate, p_holm: float, bound: float) -> str:
    """The rule of RELATIONS and BOTH."""
    low, high = estimate.low, estimate.high
    if claim.relation == "below":
        low, high, bound = -high, -low, -bound
    if p_holm >= ALPHA or low <= bound <= high:
        return INCONCLUSIVE
    return HOLDS if low > bound else FAILS


def remark(claim: ClaimEntry, estimate: Estimate, verdict: str, num_claims: int = 1) -> str | None:
    """What the verdict does not say: that a tolerated loss is one, or that so few prompts could not decide."""
    if verdict == INCONCLUSIVE and smallest_p(estimate.n_prompts) * num_claims >= ALPHA:
        return f"{estimate.n_prompts} prompts or subjects cannot decide one of {num_claims} claims"
    even = {"not_below": 0.0, "at_least_share": 1.0}.get(claim.relation)
    if even is None or estimate.high >= even:
        return None
    return {HOLDS: "a loss, but a tolerated one", FAILS: "a loss"}.get(verdict, "a loss; tolerated or not is open")


def why_missing(config: Config, claim: ClaimEntry) -> str | None:
    """Why a claim cannot be measured, if its rows or its column are declared missing."""
    table = config.table_entries[claim.table]
    if claim.table not in config.tables:
        return f"config.tables does not list {claim.table}"
    for label in (claim.left, claim.right):
        if reason := find_row(table, label).missing:
            return f"row {label}: {reason}"
    reason = metric_missing(config, table, claim.metric)
    return f"column {claim.metric}: {reason}" if reason else None


def read_sides(config: Config, results: Path, claim: ClaimEntry) -> list[tuple[str, Scores, Scores]]:
    """Per eval set the scores of both rows."""
    table = config.table_entries[claim.table]
    rows = [find_row(table, label) for label in (claim.left, claim.right)]
    sides = []
    for eval_set in claim.eval_sets:
        left, right = (read_scores(config, results, row, eval_set, claim.metric, table.tasks) for row in rows)
        sides.append((eval_set, left, right))
    check_same_scorer([side for _, left, right in sides for side in (left, right)])
    return sides


def pooled_pairs(sides: list[tuple[str, Scores, Scores]], run_seed: int | None = None) -> pd.DataFrame:
    """Pairs of all eval sets; equal prompt ids of two eval sets stay two prompts."""
    parts = []
    for eval_set, left, right in sides:
        pairs = pair(left, right, run_seed)
        parts.append(pairs.assign(prompt_id=eval_set + "/" + pairs["prompt_id"].astype(str)))
    return pd.concat(parts, ignore_index=True)


def training_seeds(table: TableEntry, left: Scores, right: Scores) -> dict[str, list[int]]:
    """Of both rows; none of an untuned row, whose one run is no training."""
    rows = {"left": left, "right": right}
    return {side: [] if find_row(table, s.label).method == UNTUNED else s.run_seeds for side, s in rows.items()}


def bound_of(config: Config, claim: ClaimEntry) -> float:
    """The value that the estimate is held against."""
    if claim.relation == "at_least_share":
        return claim.share
    entry = config.metrics.get(claim.metric)  # none for a column that is yet to come
    return -claim.margin * (entry.scale if entry else 1.0) if claim.relation == "not_below" else 0.0


def estimator(config: Config, claim: ClaimEntry) -> Callable[..., Estimate]:
    compare = paired_ratio if claim.relation == "at_least_share" else paired_difference
    scale = config.scale_entry
    return partial(compare, resamples=scale.bootstrap_resamples, seed=scale.eval_seed, bound=bound_of(config, claim))


def measure(config: Config, results: Path, claim: ClaimEntry) -> tuple[Estimate, dict]:
    """The claim's estimate, and what else is told about it."""
    sides = read_sides(config, results, claim)
    scale, estimate = config.scale_entry, estimator(config, claim)
    pairs = pooled_pairs(sides)
    both, over = (pairs["left"], pairs["right"]), units(pairs)
    wins = win_rate(*both, resamples=scale.bootstrap_resamples, seed=scale.eval_seed, **over)
    _, left, right = sides[0]
    seeds, by_seed = training_seeds(config.table_entries[claim.table], left, right), {}
    if len(every := sorted({*seeds["left"], *seeds["right"]})) > 1:
        for seed in every:
            one = pooled_pairs(sides, seed)
            by_seed[str(seed)] = estimate(one["left"], one["right"], **units(one)).value
    told = {
        "prompts": pairs["prompt_id"].nunique(),
        "win_rate": wins.value,
        "training_seeds": seeds,
        "estimate_by_training_seed": by_seed,
        "scorer": {"digest": digest(left.spec), "spec": left.spec},
        "dropped": {f"{s.label} on {name}": s.dropped for name, *rows in sides for s in rows if s.dropped},
    }
    return estimate(*both, **over), told


def judge_all(config: Config, results: Path) -> list[dict]:
    """The content of claims.json, in the order of claims.yaml."""
    found, estimates = [], []
    for name, claim in config.claims.items():
        entry = {"id": name, **_declared(config, claim), "reason": why_missing(config, claim)}
        entry |= {"n": 0, "prompts": 0}
        estimate = None
        if entry["reason"] is None:
            try:
                estimate, told = measure(config, results, claim)
                entry |= told
            except Undefined as error:
                entry["reason"] = str(error)
        found.append(entry)
        estimates.append(estimate)
    adjusted = holm([1.0 if estimate is None else estimate.p_value for estimate in estimates])
    for entry, estimate, p_holm in zip(found, estimates, adjusted, strict=True):
        entry |= {"estimate": None, "interval": None, "p_value": None, "p_value_holm": None}
        entry |= {"verdict": INCONCLUSIVE, "remark": None}
        if estimate is not None:
            entry |= {"n": estimate.n_images, "estimate": estimate.value, "interval": [estimate.low, estimate.high]}
            entry |= {"p_value": estimate.p_value, "p_value_holm": float(p_holm)}
            claim = config.claims[entry["id"]]
            entry["verdict"] = judge(claim, estimate, float(p_holm), entry["bound"])
            entry["remark"] = remark(claim, estimate, entry["verdict"], len(found))
    return found


def _declared(config: Config, claim: ClaimEntry) -> dict:
    """What claims.yaml says, and whether a row was trained on the metric."""
    fields = ("group", "text", "source", "table", "left", "right", "metric", "eval_sets", "relation")
    declared = {field: getattr(claim, field) for field in fields}
    bound = bound_of(config, claim)
    told = {"bound": bound, "is_training_reward": bool(rows_trained_on(config, declared))}
    return declared | told | {"paper": bears_out(claim, bound)}


def rows_trained_on(config: Config, entry: dict) -> list[str]:
    """Labels of the rows of a claim that were trained on its metric or a copy of it."""
    methods = {row.label: row.method for row in config.table_entries[entry["table"]].all_rows}
    labels = (entry["left"], entry["right"])
    return [label for label in labels if trained_on(config, methods.get(label), entry["metric"])]


# ---- as text ----


def to_markdown(config: Config, found: list[dict]) -> str:
    counts = Counter(entry["verdict"] for entry in found)
    total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (HOLDS, FAILS, INCONCLUSIVE))
    parts = [f"# Claims of the paper, scale {config.scale}", scale_sentence(config)]
    parts.append(f"**{len(found)} claims: {total}.**")
    printed = Counter(entry["paper"]["verdict"] for entry in found)
    told = ", ".join(f"{count} {verdict}" for verdict, count in printed.most_common())
    parts.append(f"Of the same claims in the paper's own printed numbers: {told}.")
    for group in dict.fromkeys(entry["group"] for entry in found):
        lines = [_line(config, entry) for entry in found if entry["group"] == group]
        parts += [f"## {group}", pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)]
    parts += _false_in_paper(found)
    parts += ["## How a claim is judged", HOW, _relations(), BOTH]
    parts += ["## The claims", "\n".join(_details(config, entry) for entry in found)]
    return "\n\n".join(parts) + "\n"


def _relations() -> str:
    head, *lines = [f"| {' | '.join(cells)} |" for cells in RELATIONS]
    return "\n".join([head, "|---" * len(RELATIONS[0]) + "|", *lines])


def _false_in_paper(found: list[dict]) -> list[str]:
    """The section on what the paper's own numbers contradict, from those numbers."""
    false = [f"- {entry['text']} {printed_cells(entry)} (`{entry['id']}`)" for entry in found if is_false(entry)]
    noted = [f"- {line}" for line in doubts_of(found)]
    parts = [FALSE_IN_PAPER, "\n".join(false) or "None of them."] + ([DOUBTS, "\n".join(noted)] if noted else [])
    return ["## False in the paper's own tables", *parts]


def doubts_of(found: list[dict]) -> list[str]:
    """Notes on the paper's cells of the tables that the claims are about."""
    return doubts([table for table in dict.fromkeys(e["table"] for e in found) if reference_file(table).exists()])


def is_false(entry: dict) -> bool:
    return entry["paper"]["verdict"] == PAPER_FAILS


def printed_cells(entry: dict) -> str:
    cells = [f"{c['left']} against {c['right']} on {c['eval_set']}: {c['verdict']}" for c in entry["paper"]["cells"]]
    return f"{entry['left']} against {entry['right']}: {'; '.join(cells)}."


def number(config: Config, entry: dict, value: float) -> str:
    """A ratio with at least 3 decimals, a difference with at least one more than the table prints."""
    if entry["relation"] == "at_least_share":
        return f"{value:.{digits(3, entry['interval'])}f}"
    return f"{value:+z.{digits(config.metrics[entry['metric']].decimals + 1, entry['interval'])}f}"


def _line(config: Config, entry: dict) -> dict:
    why = entry["remark"] or entry["reason"]
    line = {"claim": entry["text"], "verdict": f"**{entry['verdict']}**" + (f" ({why})" if why else "")}
    line |= {"paper's cells": entry["paper"]["verdict"], "n": entry["n"] or ""}
    if entry["estimate"] is None:
        return line | dict.fromkeys(("estimate", "95 % interval", "bound", "p", "Holm's p", "left wins"), "")
    ends = [number(config, entry, end) for end in entry["interval"]]
    return line | {
        "estimate": number(config, entry, entry["estimate"]),
        "95 % interval": f"[{', '.join(ends)}]",
        "bound": number(config, entry, entry["bound"]),
        "p": f"{entry['p_value']:.4f}",
        "Holm's p": f"{entry['p_value_holm']:.4f}",
        "left wins": f"{entry['win_rate']:.1%} of {unit(config.table_entries[entry['table']])}",
    }


def _details(config: Config, entry: dict) -> str:
    """One list item: what exactly was compared."""
    title, sets = metric_title(config, entry["metric"]), " and ".join(entry["eval_sets"])
    text = f"- `{entry['id']}` ({entry['source']}): {title} of {entry['left']} against {entry['right']} on {sets}"
    if entry["reason"]:
        return f"{text}; not measured: {entry['reason']}."
    text += f"; {entry['n']} pairs of images of {entry['prompts']} prompts; {_seeds(entry)}"
    for seed, value in entry["estimate_by_training_seed"].items():
        text += f", seed {seed}: {number(config, entry, value)}"
    text += f"; scorer {entry['scorer']['digest']}"
    if trained := rows_trained_on(config, entry):
        text += f". {' and '.join(trained)}: trained on {title} or a copy of it, so this is no independent evidence"
    if entry["dropped"]:
        text += f". Images without a score: {entry['dropped']}"
    return f"{text}."


def _seeds(entry: dict) -> str:
    left, right = (len(entry["training_seeds"][side]) for side in ("left", "right"))
    return f"{left} training seed(s)" + (f" on the left, {right} on the right" if left != right else "")


def write(config: Config, results: Path) -> list[dict]:
    found = judge_all(config, results)
    folder = paths.scale_dir(config.scale, results)
    with atomic(folder / "claims.md") as part:
        part.write_text(to_markdown(config, found))
    write_json(folder / "claims.json", found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="write results/{scale}/claims.json and claims.md")
    parser.add_argument("--results", type=Path, default=paths.RESULTS, help="folder of all results")
    add_arguments(parser)
    args = parser.parse_args()
    with sentences("eval.claims"):
        for entry in write(from_arguments(args), args.results):
            print(f"{entry['verdict']:<12}  {entry['id']}")


if __name__ == "__main__":
    main()
