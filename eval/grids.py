"""Sample grids: one line per prompt (or subject), one column per row of a table, the same noise in a line. No torch."""

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from matplotlib.artist import Artist
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from eval import style
from eval.scores import run_folders, table_entry
from eval.tables import scale_sentence
from pso import paths
from pso.dreambooth import load_subject
from pso.entries import Config, Row
from pso.figures import Grid, left_out, short_labels
from pso.hub import Hub, hub_dir
from pso.provenance import UserError

NUM_LINES = 6
MAX_WIDTH = 1600  # px; a report cuts what is wider
MAX_SIDE = 256  # px of one picture
LABEL, HEAD, FOOT, GAP = 220, 78, 34, 8  # px
DPI = 100
REAL = ("Real picture", "Another one")  # of a subject


@dataclass(frozen=True)
class Line:
    """A text and a picture for each column; where its rows' images are."""

    text: str
    pictures: list[bytes]
    task: str = ""
    prompt_id: str = ""
    image_seed: int = 0


# ---- images on disk ----


def evenly(names: list[str], count: int) -> list[str]:
    """`count` of the names, evenly spread over their sorted order."""
    names = sorted(names)
    places = np.linspace(0, len(names) - 1, min(count, len(names)))
    return [names[i] for i in places.round().astype(int)]


def shards(config: Config, results: Path, task: str, row: Row, eval_set: str) -> list[Path]:
    """The image files of a row's first training seed."""
    run = next(iter(run_folders(config, results, task, row).values()))
    folder = paths.images_dir(run, eval_set, row.steps)
    found = sorted(folder.glob("shard*.parquet"))
    if not found:
        again = f'`python -m eval.generate --model {row.model} --set \'{{"scale": "{config.scale}"}}\'`'
        raise UserError(f"{folder} holds no shard*.parquet with images of {row.label!r}; make them with {again}.")
    return found


def choose(files: list[Path]) -> tuple[list[str], int]:
    """The prompts to show, and the first image seed."""
    index = pd.concat([pq.read_table(file, columns=["prompt_id", "image_seed"]).to_pandas() for file in files])
    return evenly(list(index["prompt_id"].unique()), NUM_LINES), int(index["image_seed"].min())


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


def enlarged(data: bytes, side: int) -> np.ndarray:
    """The middle square [h, h, 3] at most `side` wide: whole-number nearest neighbour upwards, averaged downwards."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image = ImageOps.fit(image, (min(image.size), min(image.size)))
    factor = side // image.width
    if factor >= 1:
        return np.asarray(image).repeat(factor, axis=0).repeat(factor, axis=1)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


# ---- what a figure shows ----


@style.look()
def samples(config: Config, results: Path, grid: Grid) -> style.Drawn:
    """The same prompts for every row."""
    lines = prompt_lines(config, results, grid)
    return _drawn(config, grid, titles(grid), lines)


def prompt_lines(config: Config, results: Path, grid: Grid) -> list[Line]:
    task = table_entry(config, grid.table).task
    prompt_ids, image_seed, images = _images(config, results, task, grid)
    return [
        Line(images[0].loc[one, "prompt"], [frame.loc[one, "png"] for frame in images], task, one, image_seed)
        for one in prompt_ids
    ]


@style.look()
def of_subjects(config: Config, results: Path, grid: Grid) -> style.Drawn:
    """Real pictures of each subject beside one sample of every row, each subject with another prompt."""
    lines = subject_lines(config, results, grid)
    return _drawn(config, grid, [*REAL, *titles(grid)], lines)


def subject_lines(config: Config, results: Path, grid: Grid) -> list[Line]:
    """The first pictures are the real ones, empty where there are too few."""
    table, dataset = table_entry(config, grid.table), config.datasets[grid.eval_set]
    hub, lines = Hub(hub_dir(config.scale, results)), []
    for number, subject in enumerate(evenly(table.subjects, NUM_LINES)):
        real = load_subject(hub, dataset, grid.eval_set, subject).images[: len(REAL)]
        task = f"{table.task}/{subject}"
        prompt_ids, image_seed, images = _images(config, results, task, grid)
        one = prompt_ids[number % len(prompt_ids)]
        pictures = [path.read_bytes() for path in real] + [b""] * (len(REAL) - len(real))
        text = f"{subject}: {images[0].loc[one, 'prompt']}"
        lines.append(Line(text, [*pictures, *(frame.loc[one, "png"] for frame in images)], task, one, image_seed))
    return lines


def _images(config: Config, results: Path, task: str, grid: Grid) -> tuple[list[str], int, list[pd.DataFrame]]:
    """Prompts to show, image seed, and each row's images of them."""
    files = [shards(config, results, task, row, grid.eval_set) for row in grid.rows]
    prompt_ids, image_seed = choose(files[0])
    pairs = zip(files, grid.rows, strict=True)
    return prompt_ids, image_seed, [read_images(found, row.label, prompt_ids, image_seed) for found, row in pairs]


def titles(grid: Grid) -> list[str]:
    """Short labels; the steps too where they differ, the model too where one label would stand twice."""
    several = len({row.steps for row in grid.rows}) > 1
    return [
        f"{name} ({row.steps}\N{NO-BREAK SPACE}steps)" if several else name
        for name, row in zip(short_labels(grid.rows), grid.rows, strict=True)
    ]


def told(config: Config, grid: Grid, lines: list[Line]) -> str:
    """What a reader of a grid has to know."""
    table = table_entry(config, grid.table)
    said = f"{grid.eval_set}, image seed {min(line.image_seed for line in lines)}; the same prompt and noise in a line."
    if len(table.subjects) > len(lines):
        said += f" {len(lines)} of {len(table.subjects)} subjects."
    count = left_out(table)
    return f"{said} {grid.shows}" + (f" {count} rows of {grid.table} have no images yet." if count else "")


def _drawn(config: Config, grid: Grid, heads: list[str], lines: list[Line]) -> style.Drawn:
    said, columns = told(config, grid, lines), ", ".join(" ".join(head.split()) for head in heads)
    figure = sheet(heads, lines, f"Scale {config.scale}, {said}")
    caption = f"Samples of {grid.table}, from left to right: {columns}. On {said} {scale_sentence(config)}"
    return style.Drawn(grid.name, figure, f"Samples of {grid.table}, {grid.eval_set}", caption)


# ---- drawing ----


class Picture(Artist):
    """Pixels of a figure of DPI; left and bottom in its pixels. In a PNG each is one pixel, a PDF has them as they are:
    matplotlib's own kinds of pictures are resampled for it."""

    def __init__(self, pixels: np.ndarray, left: int, bottom: int) -> None:
        super().__init__()
        self.pixels, self.left, self.bottom = pixels, left, bottom

    def draw(self, renderer: RendererBase) -> None:
        height, width, _ = self.pixels.shape
        opaque = np.dstack([self.pixels, np.full((height, width), 255, np.uint8)])[::-1]  # from below
        factor = self.get_figure(root=True).dpi / DPI  # of a PDF 72 / DPI
        context = renderer.new_gc()
        renderer.draw_image(context, self.left * factor, self.bottom * factor, opaque)
        context.restore()


def sheet(titles: list[str], lines: list[Line], foot: str) -> Figure:
    """Lines of pictures, pixel by pixel, with a text before each line and a title above each column."""
    side = min((MAX_WIDTH - LABEL) // len(titles) - GAP, MAX_SIDE)
    pictures = [[enlarged(data, side) if data else None for data in line.pictures] for line in lines]
    width = max(picture.shape[1] for line in pictures for picture in line if picture is not None)
    total = LABEL + len(titles) * (width + GAP), HEAD + len(lines) * (width + GAP) + FOOT
    figure = Figure(figsize=(total[0] / DPI, total[1] / DPI), dpi=DPI)

    def text(x: float, y: float, content: str, chars: float, most: int, **how) -> None:
        wrapped = textwrap.wrap(content, max(int(chars), 8), max_lines=most, placeholder=" ...", break_on_hyphens=False)
        how = {"fontsize": 10, "va": "center", "color": style.INK} | how
        figure.text(x / total[0], y / total[1], "\n".join(wrapped), **how)

    for i, (line, row) in enumerate(zip(lines, pictures, strict=True)):
        bottom = total[1] - HEAD - (i + 1) * (width + GAP) + GAP
        text(GAP, bottom + width / 2, line.text, LABEL / 8, int(width / 17))
        for k, picture in enumerate(row):
            if picture is not None:
                figure.add_artist(Picture(picture, LABEL + k * (width + GAP), bottom))
    for k, title in enumerate(titles):
        text(LABEL + k * (width + GAP) + width / 2, total[1] - HEAD / 2 - 6, title, width / 8.6, 4, ha="center")
    text(GAP, FOOT / 2, foot, total[0] / 6.2, 2, fontsize=8, alpha=0.75)
    return figure
