"""Images of the same prompt and noise beside each other, each with the scores of exactly that image. No torch.

Which rows and prompts is as in the PNG grids (pso/figures.py, eval/grids.py). A picture is the PNG that was scored; one
larger than SIDE is averaged down and kept without loss from there, and all grids show fewer prompts if the page would
grow too large.
"""

import io
from dataclasses import dataclass
from functools import cache

import pandas as pd
from markupsafe import Markup
from PIL import Image, ImageOps

from eval.grids import REAL, Line, prompt_lines, subject_lines, titles, told
from eval.scores import IMAGE, metric_title, run_folders, table_entry
from eval.sections.judges import judged, marked
from eval.sections.page import Context, data_uri, render
from eval.tables import DASH, TRAINED_ON, decimals
from pso.entries import Row
from pso.figures import Grid, grids
from pso.paths import subject_of

TITLE = "Images of the same noise"
WHY_NONE = "No row of the tables asked for has images yet."
SIDE = 160  # px of a picture in the page: smaller ones are enlarged by a whole number
BUDGET = 11_000_000  # characters of pictures in the page
DIGITS = 3  # after the point at most: one picture's score varies more than a mean


@dataclass(frozen=True)
class Picture:
    uri: str
    width: int  # as it stands in the page
    height: int
    original: tuple[int, int]
    reduced: bool


class ShownScores:
    """Scores of the images that grids show: of the runs of a row's first training seed."""

    def __init__(self, context: Context, name: str) -> None:
        self.context, self.table, self.read = context, table_entry(context.config, name), {}
        self.metrics, self.places = judged(context.config, self.table), decimals(context.config, name)

    def value(self, row: Row, eval_set: str, metric: str, line: Line) -> float | None:
        """Of one image; None if it has no score."""
        key = row.label, eval_set, metric
        if key not in self.read:
            config, results = self.context.config, self.context.results
            first = next(iter(run_folders(config, results, self.table.task, row)))
            frame = self.context.scores(row, eval_set, metric, self.table.tasks).frame
            self.read[key] = frame[frame["run_seed"] == first].set_index(IMAGE)["score"].to_dict()
        subject = subject_of(line.task)
        prompt_id = f"{subject}/{line.prompt_id}" if subject else line.prompt_id
        return self.read[key].get((prompt_id, line.image_seed))

    def of(self, row: Row, eval_set: str, line: Line) -> list[dict]:
        """A line of text for each metric: value, and difference to the untuned picture of the same noise."""
        base, found = self.table.untuned_of(row), []
        for metric in self.metrics:
            value, places = self.value(row, eval_set, metric, line), min(self.places[metric], DIGITS)
            before = self.value(base, eval_set, metric, line) if base else None
            known = value is not None and before is not None
            found.append(
                {
                    "title": marked(self.context.config, row, metric, metric_title(self.context.config, metric)),
                    "value": DASH if value is None else f"{value:z.{places}f}",
                    "change": f"{value - before:+z.{places}f}" if known else "",
                }
            )
        return found


@cache
def picture(data: bytes) -> Picture:
    """For the page: the file's own bytes, or a smaller picture in a lossless WebP."""
    image = Image.open(io.BytesIO(data))
    kind, original = Image.MIME[image.format], image.size
    if reduced := max(original) > SIDE:
        image = ImageOps.exif_transpose(image).convert("RGB")
        factor = SIDE / max(image.size)
        image = image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BOX)
        file, kind = io.BytesIO(), "image/webp"
        image.save(file, "WEBP", lossless=True, method=2)
        data = file.getvalue()
    times = SIDE // max(image.size)
    return Picture(data_uri(data, kind), image.width * times, image.height * times, original, reduced)


def _cards(grid: Grid, line: Line, scores: ShownScores) -> list[dict]:
    """The pictures of a line with what stands below them."""
    names = [*([None] * (len(line.pictures) - len(grid.rows))), *grid.rows]  # real pictures have no row
    heads = [*REAL[: len(names) - len(grid.rows)], *titles(grid)]
    return [
        {
            "head": head,
            "alt": f"{row.label if row else head}: {line.text}",
            "picture": picture(data),
            "scores": scores.of(row, grid.eval_set, line) if row else [],
        }
        for row, head, data in zip(names, heads, line.pictures, strict=True)
        if data
    ]


def _grid(context: Context, grid: Grid, scores: ShownScores) -> dict:
    read = subject_lines if scores.table.subjects else prompt_lines
    found = read(context.config, context.results, grid)
    return {
        "title": f"{grid.table}, {grid.eval_set}: {grid.shows.partition(';')[0].rstrip('.')}",
        "told": told(context.config, grid, found),
        "lines": [{"text": line.text, "cards": _cards(grid, line, scores)} for line in found],
    }


def prompts_that_fit(every: list[dict], budget: int) -> int:
    """How many prompts each grid shows: as many as the page can hold, at least one."""
    sizes = pd.Series(0, index=range(max(len(grid["lines"]) for grid in every)))
    for grid in every:
        for number, line in enumerate(grid["lines"]):
            sizes[number] += sum(len(card["picture"].uri) for card in line["cards"])
    return max(int((sizes.cumsum() <= budget).sum()), 1)


def section(context: Context) -> Markup | None:
    every, scores = [], {}
    for grid in grids(context.config):
        scores.setdefault(grid.table, ShownScores(context, grid.table))
        every.append(_grid(context, grid, scores[grid.table]))
    if not every:
        return None
    count, most = prompts_that_fit(every, BUDGET), max(len(grid["lines"]) for grid in every)
    shown = [grid | {"lines": grid["lines"][:count]} for grid in every]
    cards = [card for grid in shown for line in grid["lines"] for card in line["cards"]]
    reduced = {card["picture"].original for card in cards if card["picture"].reduced}
    lacking = sum(one["value"] == DASH for card in cards for one in card["scores"])
    picture.cache_clear()
    return render(
        "grids.html",
        grids=shown,
        fewer=f"{count} of {most} prompts" if count < most else "",
        reduced=", ".join(f"{width} x {height}" for width, height in sorted(reduced)),
        side=SIDE,
        megabytes=BUDGET // 1_000_000,
        lacking=lacking,
        seed=context.config.seeds[0] if len(context.config.seeds) > 1 else None,
        trained_on=TRAINED_ON if any(TRAINED_ON in one["title"] for card in cards for one in card["scores"]) else "",
    )
