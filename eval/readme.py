"""Numbers of the documents, written from the committed results so that nobody types them.

    make readme

In README.md, between `<!-- results:begin -->` and its end: the miniature's tables, each with its paragraph, and what
became of the claims; between `<!-- cost:begin -->` and its end: the stages of results/miniature/cost.md. In
eval/README.md, `scorers`: our scorers against the official ones, from results/verify_scorers.json. In pso/README.md,
`speed`: our updates against those of others, from results/benchmarks/cpu.json. The method pages, docs/methods/, are
filled as well (eval/method_pages.py). No torch.
"""

import json
import sys
from pathlib import Path

import pandas as pd

from eval.claims import FAILS, HOLDS, INCONCLUSIVE
from eval.method_pages import pages
from eval.prose import paragraph
from eval.scores import metric_title
from pso.config import load
from pso.entries import Config
from pso.paths import RESULTS, scale_dir
from pso.provenance import ROOT, UserError, atomic, sentences

SCALE = "miniature"
PREFERENCE = (
    "pick_score",
    "clip_score",
    "image_reward",
    "aesthetic_score",
    "hps_v21",
    "oracle_accuracy",
    "sharpness",
    "texture",
)
SHOWN = {"table1": PREFERENCE, "table2": PREFERENCE, "table3": ("clip_t", "dino", "clip_i"), "table4": PREFERENCE}
FIGURE_1B = "Naive"  # extra rows shown beside the paper's: the vanilla loss on a distilled model


def table_block(config: Config, base: Path, name: str) -> str:
    """The paper's rows and the naive fine-tunes, mean over the images of all eval sets, and what came out."""
    entry, frame = config.table_entries[name], pd.read_csv(base / "tables" / f"{name}.csv")
    labels = [row.label for row in entry.rows] + [r.label for r in entry.extra_rows if r.label.startswith(FIGURE_1B)]
    means = frame.groupby("label", sort=False)[list(SHOWN[name])].mean().loc[labels]  # eval sets of equal size
    lines = pd.DataFrame({"": means.index})
    for metric in SHOWN[name]:
        decimals = config.metrics[metric].decimals
        lines[metric_title(config, metric)] = [f"{value:.{decimals}f}" for value in means[metric]]
    align = ("left", *["right"] * len(SHOWN[name]))
    found = json.loads((base / "tables" / f"{name}.diff.json").read_text())
    told = paragraph(found, {metric: metric_title(config, metric) for metric in entry.metrics})
    title = f"**Table {name.removeprefix('table')}.** {entry.caption}"
    table = lines.to_markdown(index=False, disable_numparse=True, colalign=align)
    return "\n\n".join([title, table, folded("Against the base rows, and where the paper says otherwise", told)])


def folded(summary: str, text: str) -> str:
    """Markdown that a reader opens."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def claims_block(claims: list[dict]) -> str:
    """Verdicts by group, and each claim that does not hold."""
    frame = pd.DataFrame(claims)
    counts = pd.crosstab(frame["group"], frame["verdict"]).reindex(columns=[HOLDS, FAILS, INCONCLUSIVE], fill_value=0)
    counts = counts.loc[frame["group"].unique()]
    counts.loc["**all**"] = counts.sum()
    parts = [f"**Claims.** {len(claims)} statements of the paper, judged on the stand-in world:"]
    parts.append(counts.rename_axis("about").reset_index().to_markdown(index=False))
    if texts := [c["text"] for c in claims if c["verdict"] == FAILS]:
        parts.append(f"Measured and {FAILS}:\n\n" + "\n".join(f"- {text}" for text in texts))
    open_ones = [c for c in claims if c["verdict"] == INCONCLUSIVE]
    missing = sum(bool(c["reason"]) for c in open_ones)
    told = f"{len(open_ones)} are inconclusive: their interval, or Holm's p, does not decide"
    told += f", or ({missing} of them) they could not be measured" if missing else ""
    parts.append(f"{told} ([claims](results/miniature/claims.md)).")
    return "\n\n".join(parts)


def scorers_block(found: dict) -> str:
    """Largest difference of every scorer from the official code."""
    frame = pd.DataFrame(found["scorers"])
    frame["official code"] = [", ".join(f"{name} {version}" for name, version in p.items()) for p in frame["packages"]]
    frame["max difference"] = [f"{value:.1e}" if value else "0" for value in frame["max_abs_diff"]]
    shown = ["scorer", "size", "transform", "pictures", "max difference", "official code"]
    return frame[shown].rename(columns={"size": "network"}).to_markdown(index=False, disable_numparse=True)


SPEED = {  # of the comparisons in cpu.json
    "online": "Online-PSO, as released",
    "offline": "Offline-PSO, in the released style",
    "diffusers-dpo": "Diffusion-DPO of diffusers",
    "spo": "SPO, on one transition a pair",
    "mapo": "MaPO",
}


def speed_block(found: dict) -> str:
    """Our update against those of others on a CPU: how many times as fast, and what an update does."""
    lines = []
    for name, one in found["comparisons"].items():
        counts, ratio = one["counts"], one["ratio"]
        lines.append(
            {
                "update": SPEED[name],
                "against: as released": f"{ratio['as released']:.2f}",
                "tuned": f"{ratio['tuned']:.2f}",
                "noise": f"{ratio['ours again']:.2f}",
                "UNet calls": f"{counts['ours']['unet_calls']} / {counts['as released']['unet_calls']}",
                "host syncs": f"{counts['ours']['host_syncs']} / {counts['as released']['host_syncs']}",
                "peak RSS, GiB": " / ".join(f"{one['peak_rss_gib'][v]['most']:.2f}" for v in ("ours", "as released")),
            }
        )
    made = found["generation_and_scoring"]
    speeds = made["pictures_per_s"]
    cpus, kind = found["hardware"]["cpus"], found["hardware"]["machine"]
    head = (
        f"{found['pairs']} pairs, {found['timesteps']} steps, {found['rounds']} rounds, {found['threads']} threads of "
        f"{cpus} CPUs ({kind}); how many times as fast ours is, median of ratios within a round; *noise* is ours "
        "against itself; counts and memory are ours / as released:"
    )
    pictures = (
        f"Pictures generated and scored: {speeds['ours']} per second in batches of {found['pictures']}, "
        f"{speeds['one by one']} with diffusers' pipeline and the scorer called for one at a time: **{made['ratio']} "
        "times as fast**."
    )
    table = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    return "\n\n".join([head, table, pictures, f"`{found['command']}`"])


def blocks(config: Config, base: Path) -> dict[Path, dict[str, str]]:
    """Document -> marker -> text."""
    results = [table_block(config, base, name) for name in SHOWN]
    results.append(claims_block(json.loads((base / "claims.json").read_text())))
    scorers = json.loads((base.parent / "verify_scorers.json").read_text())
    cost = (base / "cost.md").read_text().split("\n\n")[0]
    speed = speed_block(json.loads((base.parent / "benchmarks" / "cpu.json").read_text()))
    return {
        ROOT / "README.md": {"results": "\n\n".join(results), "cost": cost},
        ROOT / "eval" / "README.md": {"scorers": scorers_block(scorers)},
        ROOT / "pso" / "README.md": {"speed": speed},
        **pages(config, base),
    }


def fill(text: str, contents: dict[str, str], document: str = "README.md") -> str:
    """The text of a document with everything between each pair of markers replaced."""
    for name, content in contents.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise UserError(f"{document} needs the lines {begin} and {end} once each.")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    with sentences("readme"):
        config = load({"scale": SCALE})
        base = scale_dir(SCALE, ROOT / RESULTS)
        if not (base / "claims.json").exists():
            raise UserError(f"{base.relative_to(ROOT)} has no results yet; run `make` first.")
        for path, contents in blocks(config, base).items():
            document = str(path.relative_to(ROOT))
            text = fill(path.read_text(), contents, document)
            with atomic(path) as part:
                part.write_text(text)
            print(document, file=sys.stderr)


if __name__ == "__main__":
    main()
