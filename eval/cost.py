"""What a whole scale cost, job by job, from the records that the jobs left.

    python -m eval.cost

Writes results/{scale}/cost.md: seconds, peak memory and UNet forwards per job, and the sums.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from pso.config import add_arguments, from_arguments
from pso.entries import Config
from pso.paths import RESULTS, scale_dir
from pso.provenance import UserError, atomic, sentences

COLUMNS = {"wall_s": "wall s", "cpu_s": "CPU s", "peak_rss_gib": "peak RSS GiB", "unet_forwards": "UNet forwards"}
RECORDS = ("hub/*.json", "cache/*/*.json", "*/*/*/seed*/run.json", "*/*/images.json", "*/*/scores.json")


def records(root: Path) -> list[dict]:
    """Every record below results/{scale}, in the order of the DAG."""
    paths = [path for pattern in RECORDS for path in sorted(root.glob(pattern))]
    if not paths:
        raise UserError(f"{root} holds no record of a job yet; run `snakemake --cores 2` first.")
    found = []
    for path in paths:
        content = json.loads(path.read_text())
        name = str(path.relative_to(root).with_suffix(""))
        found.append({"job": name, **content["cost"], "threads": content["hardware"].get("threads")})
    return found


def table(config: Config, results: Path) -> str:
    frame = pd.DataFrame(records(scale_dir(config.scale, results))).reindex(columns=["job", *COLUMNS])
    total = {"job": "**sum** (peak: largest)", "peak_rss_gib": frame["peak_rss_gib"].max()}
    total |= {name: frame[name].sum() for name in ("wall_s", "cpu_s", "unet_forwards")}
    frame = pd.concat([frame, pd.DataFrame([total])], ignore_index=True).rename(columns=COLUMNS)
    frame["UNet forwards"] = [f"{int(v):,}" if v > 0 else "" for v in frame["UNet forwards"].fillna(0)]
    formats = ("", ".0f", ".0f", ".2f", "")
    return frame.to_markdown(index=False, floatfmt=formats, disable_numparse=[4], colalign=("left", *["right"] * 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    with sentences("cost"):
        config = from_arguments(args)
        with atomic(scale_dir(config.scale, args.results) / "cost.md") as part:
            part.write_text(table(config, args.results) + "\n")


if __name__ == "__main__":
    main()
