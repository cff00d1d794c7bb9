"""Figures from images and training logs: sample grids and curves. No torch.

samples_{eval_set}.png: one line per prompt, one column per row of table1, the same prompt and noise
in a line. curves.png: reward and KL of every run while it was tuned (the probes in train.jsonl).
"""

import argparse
import io
import json
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from PIL import Image

from eval.scores import all_rows, run_folders, table_entry
from pso import paths
from pso.config import add_arguments, from_arguments
from pso.entries import UNTUNED, Config, Row
from pso.provenance import UserError, atomic, sentences

matplotlib.use("Agg")

TABLE = "table1"
NUM_PROMPTS = 6  # lines of a sample grid
MAX_WIDTH = 1600  # px; a report cuts what is wider
MAX_SIDE = 256  # px of one picture
LABEL, HEAD, FOOT, GAP = 220, 78, 34, 8  # px
DPI = 100
# Okabe and Ito's colours; marker and dash tell the lines apart in grey
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "D", "^", "v", "P", "X"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]


def columns(config: Config) -> list[Row]:
    """table1's rows that exist: what was not tuned, the naive fine-tunes, the paper's methods."""
    table = table_entry(config, TABLE)
    untuned = [row for row in table.rows if row.method == UNTUNED]
    tuned = [row for row in table.rows if row.method != UNTUNED]
    return [row for row in [*untuned, *table.extra_rows, *tuned] if row.missing is None]


def save(figure: Figure, path: Path) -> Path:
    with atomic(path) as part:
        # no date and no version in the file: the same input gives the same bytes
        figure.savefig(part, format="png", dpi=DPI, metadata={"Software": None})
    return path


# ---- sample grids ----


def evenly(names: list[str], count: int) -> list[str]:
    """`count` of the names, evenly spread over their sorted order."""
    names = sorted(names)
    places = np.linspace(0, len(names) - 1, min(count, len(names)))
    return [names[i] for i in places.round().astype(int)]


def shards(config: Config, results: Path, row: Row, eval_set: str) -> list[Path]:
    """The image files of a row's first training seed."""
    run = next(iter(run_folders(config, results, table_entry(config, TABLE).task, row).values()))
    folder = paths.images_dir(run, eval_set, row.steps)
    found = sorted(folder.glob("shard*.parquet"))
    if not found:
        again = f'`python -m eval.generate --model {row.model} --set \'{{"scale": "{config.scale}"}}\'`'
        raise UserError(f"{folder} holds no shard*.parquet with images of {row.label!r}; make them with {again}.")
    return found


def choose(files: list[Path]) -> tuple[list[str], int]:
    """The prompts to show, and the first image seed."""
    index = pd.concat([pq.read_table(file, columns=["prompt_id", "image_seed"]).to_pandas() for file in files])
    return evenly(list(index["prompt_id"].unique()), NUM_PROMPTS), int(index["image_seed"].min())


def read_images(files: list[Path], label: str, prompt_ids: list[str], image_seed: int) -> pd.DataFrame:
    """prompt and png of the chosen images, indexed by prompt_id."""
    wanted = [("prompt_id", "in", prompt_ids), ("image_seed", "==", image_seed)]
    read = [pq.read_table(file, columns=["prompt_id", "prompt", "png"], filters=wanted).to_pandas() for file in files]
    images = pd.concat(read).set_index("prompt_id")
    absent = sorted(set(prompt_ids) - set(images.index))
    if absent or images.index.has_duplicates:
        raise UserError(
            f"{files[0].parent} has {len(images)} images with seed {image_seed} for {len(prompt_ids)} prompts of "
            f"{label!r} (missing: {', '.join(absent) or 'none'}); delete the folder and generate it again."
        )
    return images


def enlarged(png: bytes, side: int) -> np.ndarray:
    """[h, w, 3] at most `side` wide: whole-number nearest neighbour upwards, averaged downwards."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    factor = side // image.width
    if factor >= 1:
        return np.asarray(image).repeat(factor, axis=0).repeat(factor, axis=1)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def samples(config: Config, results: Path, eval_set: str) -> Figure:
    rows = columns(config)
    files = {row.label: shards(config, results, row, eval_set) for row in rows}
    prompt_ids, image_seed = choose(files[rows[0].label])
    images = {label: read_images(found, label, prompt_ids, image_seed) for label, found in files.items()}
    side = min((MAX_WIDTH - LABEL) // len(rows) - GAP, MAX_SIDE)
    pictures = [[enlarged(images[row.label].loc[p, "png"], side) for row in rows] for p in prompt_ids]
    height, width = np.max([picture.shape[:2] for line in pictures for picture in line], axis=0)
    total = LABEL + len(rows) * (width + GAP), HEAD + len(prompt_ids) * (height + GAP) + FOOT
    figure = Figure(figsize=(total[0] / DPI, total[1] / DPI), dpi=DPI)

    def text(x: float, y: float, content: str, chars: float, lines: int, **how) -> None:
        wrapped = textwrap.wrap(
            content, max(int(chars), 8), max_lines=lines, placeholder=" ...", break_on_hyphens=False
        )
        how = {"fontsize": 10, "va": "center", "parse_math": False} | how
        figure.text(x / total[0], y / total[1], "\n".join(wrapped), **how)

    for i, (prompt_id, line) in enumerate(zip(prompt_ids, pictures, strict=True)):
        bottom = total[1] - HEAD - (i + 1) * (height + GAP) + GAP
        text(GAP, bottom + height / 2, images[rows[0].label].loc[prompt_id, "prompt"], LABEL / 8, int(height / 17))
        for k, picture in enumerate(line):
            figure.figimage(picture, LABEL + k * (width + GAP), bottom, origin="upper")
    for k, row in enumerate(rows):
        title = f"{row.label} ({row.steps} steps)"
        text(LABEL + k * (width + GAP) + width / 2, total[1] - HEAD / 2 - 6, title, width / 7.9, 4, ha="center")
    text(GAP, FOOT / 2, _told(config, eval_set, image_seed), 1000, 1, fontsize=9, color="#444444")
    return figure


def _told(config: Config, eval_set: str, image_seed: int) -> str:
    table = table_entry(config, TABLE)
    left_out = sum(row.missing is not None for row in all_rows(table))
    told = f"Scale {config.scale}, {eval_set}, image seed {image_seed}; the same prompt and noise in a line."
    return told + (f" {left_out} rows of {TABLE} have no images yet." if left_out else "")


# ---- curves ----


def read_probes(path: Path) -> pd.DataFrame:
    """update, reward (NaN without one) and total KL of every probe; the last of equal updates counts."""
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"{path} line {number} is not JSON; delete that line and draw the curves again.") from None
        if entry.get("event") == "probe":
            total = sum(entry["kl"].values())
            lines.append({"update": entry["update"], "reward": entry.get("reward"), "kl": total})
    frame = pd.DataFrame(lines, columns=["update", "reward", "kl"]).astype(float)
    return frame.drop_duplicates("update", keep="last").sort_values("update")


def curves(config: Config, results: Path) -> Figure:
    figure = Figure(figsize=(15, 5.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 3)
    axes = [("update", "reward"), ("update", "kl"), ("kl", "reward")]
    without: dict[str, list[str]] = {}
    for place, row in enumerate(row for row in columns(config) if row.method != UNTUNED):
        style = {"color": COLOURS[place % 7], "marker": MARKERS[place % 7], "linestyle": DASHES[place % 7]}
        for seed, folder in run_folders(config, results, table_entry(config, TABLE).task, row).items():
            name = f"{row.label}, seed {seed}" if len(config.seeds) > 1 else row.label
            path = folder / "train.jsonl"
            probes = read_probes(path) if path.exists() else pd.DataFrame(columns=["update", "reward", "kl"])
            if probes.empty:
                without.setdefault("No probes", []).append(name)
            elif probes["reward"].isna().all():
                without.setdefault("No reward measured", []).append(name)
            label = row.label if seed == config.seeds[0] else None
            for panel, (x, y) in zip(panels, axes, strict=True):
                panel.plot(probes[x], probes[y], markersize=5, linewidth=1.6, label=label, **style)
    names = {"update": "Update", "reward": "Reward of the probe's images", "kl": "KL(theta | pre), sum over steps"}
    for panel, (x, y) in zip(panels, axes, strict=True):
        panel.set(xlabel=names[x], ylabel=names[y])
        panel.grid(alpha=0.3)
    told = [f"{what}: {', '.join(names)}." for what, names in without.items()]
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("\n".join(textwrap.wrap(" ".join([f"Scale {config.scale}.", *told]), 170)), fontsize=10)
    return figure


def write(config: Config, results: Path) -> list[Path]:
    folder = paths.scale_dir(config.scale, results) / "figures"
    written = []
    for eval_set in table_entry(config, TABLE).eval_sets:
        written.append(save(samples(config, results, eval_set), folder / f"samples_{eval_set}.png"))
    return [*written, save(curves(config, results), folder / "curves.png")]


def main() -> None:
    parser = argparse.ArgumentParser(description="write results/{scale}/figures/samples_*.png and curves.png")
    parser.add_argument("--results", type=Path, default=paths.RESULTS, help="folder of all results")
    add_arguments(parser)
    args = parser.parse_args()
    with sentences("eval.figures"):
        for path in write(from_arguments(args), args.results):
            print(path)


if __name__ == "__main__":
    main()
