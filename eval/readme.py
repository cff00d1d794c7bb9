"""README's numbers, written from the committed results so that nobody types them.

    make readme

Between `<!-- results:begin -->` and its end: the miniature's measured rows of table 1 and the verdicts.
Between `<!-- cost:begin -->` and its end: results/miniature/cost.md. No torch.
"""

import json
import sys
from pathlib import Path

import pandas as pd

from pso.config import load
from pso.entries import Config
from pso.paths import RESULTS, scale_dir
from pso.provenance import ROOT, UserError, atomic, sentences

SCALE, TABLE = "miniature", "table1"
SHOWN = ("pick_score", "clip_score", "aesthetic_score", "oracle_accuracy", "sharpness", "texture")


def results_block(config: Config, base: Path) -> str:
    """Measured rows, mean over the images of both eval sets, and one line per claim."""
    frame = pd.read_csv(base / "tables" / f"{TABLE}.csv")
    frame = frame[frame["pick_score"].notna()]
    means = frame.groupby("label", sort=False)[list(SHOWN)].mean()  # eval sets of equal size
    lines = pd.DataFrame({"": means.index})
    for name in SHOWN:
        entry = config.metrics[name]
        lines[entry.title] = [f"{value:.{entry.decimals}f}" for value in means[name]]
    table = lines.to_markdown(index=False, disable_numparse=True, colalign=("left", *["right"] * len(SHOWN)))
    claims = json.loads((base / "claims.json").read_text())
    said = [f"- **{c['verdict']}**{f' ({remark})' if (remark := c['remark']) else ''}: {c['text']}" for c in claims]
    return "\n".join([table, "", *said])


def blocks(config: Config, base: Path) -> dict[str, str]:
    return {"results": results_block(config, base), "cost": (base / "cost.md").read_text().strip()}


def fill(text: str, contents: dict[str, str]) -> str:
    """The text with everything between each pair of markers replaced."""
    for name, content in contents.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise UserError(f"README.md needs the lines {begin} and {end} once each.")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    with sentences("readme"):
        config = load({"scale": SCALE})
        base = scale_dir(SCALE, ROOT / RESULTS)
        if not (base / "claims.json").exists():
            raise UserError(f"{base.relative_to(ROOT)} has no results yet; run `make` first.")
        text = fill((ROOT / "README.md").read_text(), blocks(config, base))
        with atomic(ROOT / "README.md") as part:
            part.write_text(text)
    print("README.md", file=sys.stderr)


if __name__ == "__main__":
    main()
