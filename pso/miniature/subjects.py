"""The stand-in DreamBooth set: a few things that no caption of the world can name, in the real folder's layout.

A thing has the shape of one of the world's classes and two colours in a fixed pattern; `world` itself draws every
shape in one colour. Position, background, size and grain change from picture to picture, the thing does not.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from pso.dreambooth import HEADINGS, PROMPT_FILE
from pso.entries import Config
from pso.hub import Hub
from pso.miniature import world
from pso.miniature.common import job
from pso.miniature.data import png
from pso.provenance import atomic

DREAMBOOTH = ("google/dreambooth", "dataset")
NUM_PICTURES = 5  # of each subject; the real set has 4 to 6
NUM_TEMPLATES = 25
TEMPLATES = (  # the world's wordings, with the identifier in place of the colour
    "a {{0}} {{1}} on the {position}, {background} background",
    "{{0}} {{1}}, {position} side, over {background}",
    "on {background} there is a {{0}} {{1}} at the {position}",
    "{position}: one {{0}} {{1}}, backdrop {background}",
)
PATTERNS = ("stripes", "halves", "core", "checks")
WIDTH = 4.0  # px of a stripe or check
CORE = 0.45  # of the size: radius of the inner disc
SIZES = (7.5, 9.0)  # px, the upper half of the world's: a pattern needs room

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Thing:
    shape: str
    pattern: str
    first: Colour
    second: Colour


SUBJECTS = {  # colours that the stand-in VAE can tell apart in a pattern
    "cored_circle": Thing("circle", "core", world.COLOURS["white"], world.COLOURS["blue"]),
    "striped_triangle": Thing("triangle", "stripes", world.GOLD, world.COLOURS["green"]),
    "split_cross": Thing("cross", "halves", world.GOLD, world.COLOURS["red"]),
}


def second_part(pattern: str, size: float, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Share of the second colour at (dx, dy) px from the centre, with edges one pixel wide."""
    if pattern == "halves":
        return np.clip(dx + 0.5, 0, 1)
    if pattern == "core":
        return np.clip(CORE * size - np.hypot(dx, dy) + 0.5, 0, 1)
    rows = _bands(dy)
    return rows if pattern == "stripes" else np.abs(rows - _bands(dx))


def _bands(along: np.ndarray) -> np.ndarray:
    """Alternating bands of WIDTH px, a band of 1 in the middle."""
    return np.clip(WIDTH / 2 - np.abs((along + WIDTH) % (2 * WIDTH) - WIDTH) + 0.5, 0, 1)


def render(thing: Thing, background: Colour, position: float, rng: np.random.Generator) -> np.ndarray:
    """One picture [32, 32, 3] uint8 of a thing at x = position, with the world's jitter and grain, without rim."""
    size = float(rng.uniform(*SIZES))
    cx, cy = (centre + rng.uniform(-world.JITTER, world.JITTER) for centre in (position, world.CENTRE_Y))
    image = world.ground(background, rng)
    y, x = np.mgrid[0 : world.RESOLUTION, 0 : world.RESOLUTION]
    dx, dy = x - cx, y - cy
    share = second_part(thing.pattern, size, dx, dy)[..., None]
    painted = (1 - share) * np.asarray(thing.first) + share * np.asarray(thing.second)
    body = np.clip(0.5 - world.signed_distance(thing.shape, size, dx, dy), 0, 1)[..., None]
    return np.clip(np.round((1 - body) * image + body * painted), 0, 255).astype(np.uint8)


def pictures(thing: Thing, count: int, seed: int) -> list[np.ndarray]:
    """Of one thing: backgrounds and positions in turn, so that neither belongs to it."""
    rng = np.random.default_rng(seed)
    places = [(b, p) for p in world.POSITIONS.values() for b in world.BACKGROUNDS.values()]
    order = rng.permutation(len(places))
    return [render(thing, *places[order[i % len(places)]], rng) for i in range(count)]


def templates() -> list[str]:
    """25 different prompts, {0} for the identifier and {1} for the class: every wording, background and position."""
    places, found = list(product(world.BACKGROUNDS, world.POSITIONS)), []
    for i in range(NUM_TEMPLATES):
        turn, place = divmod(i, len(places))
        background, position = places[place]
        found.append(TEMPLATES[(place + turn) % len(TEMPLATES)].format(position=position, background=background))
    return found


def prompt_file() -> str:
    """The text of prompts_and_classes.txt in the form of the real one."""
    classes = [f"{name},{thing.shape}" for name, thing in SUBJECTS.items()]
    lines = [f"{template!r}.format(unique_token, class_token)," for template in templates()]
    lists = [line for heading in HEADINGS for line in (heading, "", "prompt_list = [", *lines, "]", "")]
    return "\n".join(["Classes", "", "subject_name,class", *classes, "", "Prompts", "", *lists])


def make(config: Config, hub: Hub) -> dict:
    folder = hub.root / DREAMBOOTH[0] / DREAMBOOTH[1]
    with atomic(folder / PROMPT_FILE) as part:
        part.write_text(prompt_file())
    for number, (name, thing) in enumerate(SUBJECTS.items()):
        for k, picture in enumerate(pictures(thing, NUM_PICTURES, config.scale_entry.standin.seed + 60 + number)):
            with atomic(folder / name / f"{k:02d}.png") as part:
                part.write_bytes(png(picture))
    return {"subjects": {name: NUM_PICTURES for name in SUBJECTS}}


if __name__ == "__main__":
    job("subjects", make)
