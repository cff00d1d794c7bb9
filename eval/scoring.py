"""Scores of pictures by several scorers: batch by batch, every scorer on a batch before the next one is decoded.

So a picture is decoded once, and scorers share transforms and features (eval.transforms.one_batch). While they look at
a batch, the next one is read and decoded in a thread of its own: memory holds two batches, however many pictures there
are. A score depends on its picture, its prompt and what it is compared with alone.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from PIL import Image

from eval.pictures import Tally
from eval.transforms import one_batch
from pso.background import Ahead
from pso.provenance import UserError

BATCH = 64
METADATA_KEY = b"pso_bench"


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def score_pictures(
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    scorers: dict,
    *,
    prompt_ids: Sequence[str] | None = None,
    untuned: Sequence[Image.Image] | None = None,
    real: Sequence[Image.Image] | None = None,
    names: Sequence[str] | None = None,
    tally: Tally | None = None,
    progress: Callable[[int, int], None] | None = None,
    batch: int = BATCH,
    known: dict[str, np.ndarray] | None = None,
) -> pd.DataFrame:
    """A line per picture in their order, a float64 column per scorer.

    pictures: of any size and mode; a sequence that decodes pictures[i] when asked (eval.pictures.Pictures) is asked
    for one batch at a time. scorers: name -> scorer, as pso.models.load_metric gives them. Scorers that compare take
    from `untuned` (one for each picture), `real` (the subject's) and the pictures that share a prompt id (else a
    prompt). names: for sentences. tally: counts what is unusual. progress(done, all) is called after every batch.
    known: scores of some scorers that are taken over, NaN where there is none; every picture is decoded all the same.

    >>> from PIL import Image
    >>> from eval.metrics import sharpness
    >>> from eval.score import score_pictures
    >>> board = Image.new("L", (64, 64))
    >>> board.putdata([10 * ((x + y) % 2) for y in range(64) for x in range(64)])
    >>> scorers = {"sharpness": sharpness.load({}, "cpu")}
    >>> score_pictures([board, Image.new("RGB", (32, 48), "teal")], ["a board", "teal"], scorers).round(3)
       sharpness
    0     1600.0
    1        0.0
    """
    names = [str(i) for i in range(len(pictures))] if names is None else list(names)
    check_given(pictures, prompts, scorers, untuned=untuned, real=real)
    keys = list(prompts if prompt_ids is None else prompt_ids)
    together = any(_compared(s) == "siblings" for s in scorers.values())
    found = {name: np.full(len(pictures), np.nan) for name in scorers} | {k: v.copy() for k, v in (known or {}).items()}

    def score_rows(rows: tuple[int, ...], following: tuple[int, ...] | None) -> None:
        # a function, so that nothing of a batch is kept while the one after the next is read
        images, others = ahead.take(rows, following)
        if tally is not None:
            tally.add(images)
        with one_batch():
            for name, scorer in scorers.items():
                if of := [k for k, row in enumerate(rows) if np.isnan(found[name][row])]:  # places in the batch
                    some, beside = [rows[k] for k in of], {kind: [all_[k] for k in of] for kind, all_ in others.items()}
                    texts, named = [prompts[row] for row in some], [names[row] for row in some]
                    found[name][some] = _score(name, scorer, [images[k] for k in of], texts, beside, named)

    batches = _batches(_groups(keys), batch) if together else _in_order(len(pictures), batch)
    done = 0
    with Ahead(partial(_read, pictures, keys, untuned, real)) as ahead:
        for rows, following in pairwise([*map(tuple, batches), None]):
            score_rows(rows, following)
            done += len(rows)
            if progress is not None:
                progress(done, len(pictures))
    return pd.DataFrame(found)


def _read(pictures, keys: list, untuned, real, rows: tuple[int, ...]) -> tuple[list, dict]:
    """A batch, decoded, and what its pictures are compared with."""
    images = [pictures[i] for i in rows]
    others = {"pictures": [real] * len(rows), "siblings": _siblings(images, [keys[i] for i in rows])}
    if untuned is not None:
        others["untuned"] = [[image] for image in (images if untuned is pictures else [untuned[i] for i in rows])]
    return images, others


def check_given(pictures, prompts, scorers: dict, untuned, real) -> None:
    """Whether everything that the scorers need is there, before anything is decoded."""
    if len(prompts) != len(pictures):
        raise UserError(f"{len(pictures)} pictures came with {len(prompts)} prompts; give one for each.")
    if untuned is not None and len(untuned) != len(pictures):
        raise UserError(f"{len(pictures)} pictures came with {len(untuned)} of the untuned model; give one for each.")
    for name, scorer in scorers.items():
        needed = _compared(scorer)
        if needed == "untuned" and untuned is None:
            raise UserError(f"{name} compares with the untuned model's pictures; give --untuned or leave it out.")
        if needed == "pictures" and not real:
            raise UserError(f"{name} compares with a subject's real pictures; give --pictures or leave it out.")


def _compared(scorer) -> str | None:
    return getattr(scorer, "compared_with", None)


def _groups(keys: list) -> list[list[int]]:
    """Rows of each prompt, prompts in the order in which they come first."""
    groups: dict = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _in_order(count: int, size: int) -> Iterator[list[int]]:
    return (list(range(i, min(i + size, count))) for i in range(0, count, size))


def _batches(groups: list[list[int]], size: int) -> Iterator[list[int]]:
    """Whole prompts, so that all pictures of one are in a batch, even where they are more than `size`."""
    rows: list[int] = []
    for group in groups:
        if rows and len(rows) + len(group) > size:
            yield sorted(rows)
            rows = []
        rows += group
    if rows:
        yield sorted(rows)


def _siblings(images: list[Image.Image], keys: list) -> list[list[Image.Image]]:
    """The others of each picture's prompt, of a batch of whole prompts."""
    of: dict = {}
    for row, key in enumerate(keys):
        of.setdefault(key, []).append(row)
    return [[images[other] for other in of[key] if other != row] for row, key in enumerate(keys)]


def _score(name: str, scorer, images: list, prompts: list[str], others: dict, names: list[str]) -> np.ndarray:
    more = []
    if (needed := _compared(scorer)) is not None:
        more = [others[needed]]
        if alone := [own for own, given in zip(names, others[needed], strict=True) if not given]:
            raise UserError(
                f"{name} compares pictures of one prompt, and {alone[0]} is the only one of its own; "
                "make at least two for every prompt, or leave the metric out."
            )
    try:
        scores = scorer.score(images, prompts, *more).double().cpu()
    except ValueError as error:  # of a picture or a prompt that it cannot judge
        which = f"one of the images {names[0]} to {names[-1]}"
        raise UserError(f"{name} cannot score {which} ({error}); take it out or leave the metric out.") from error
    if scores.shape != (len(images),):
        raise ValueError(f"{name} gave {tuple(scores.shape)} for {len(images)} pictures; expected one score for each")
    if not torch.isfinite(scores).all():
        bad = names[int((~torch.isfinite(scores)).nonzero()[0])]
        raise UserError(f"{name} of image {bad} is not finite; is the checkpoint whole?")
    return scores.numpy()


class Progress:
    """Calls `say` with how far a job is, every few seconds of a job that takes so long."""

    def __init__(self, say: Callable[[str], None], every: float = 5.0):
        self.say, self.every = say, every
        self.began = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        rate = done / max(now - self.began, 1e-9)
        left = (total - done) / rate
        self.say(f"{done}/{total} pictures  {rate:.1f}/s  left {left // 60:.0f}:{left % 60:02.0f}")
