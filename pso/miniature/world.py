"""The stand-in world: captioned 32 x 32 pictures with known attributes.

A picture shows one shape on a grainy background. Its caption names shape, colour, background and
position. Two things are never in a caption but people here prefer them: a gold rim (`glow`, 0 to 1)
and a large shape (`size`, half its extent in px). The grain is an independent coin flip per
2 x 2 px block, so the best mean-square guess of it is a flat colour: a model that has been pulled
towards a mean loses it, and the oracle can measure that.

numpy only; every draw comes from the generator that the caller passes.
"""

from dataclasses import dataclass

import numpy as np

RESOLUTION = 32
SHAPES = ("circle", "triangle", "cross")
COLOURS = {"red": (228, 38, 30), "green": (40, 190, 50), "blue": (40, 80, 240), "white": (244, 244, 248)}
BACKGROUNDS = {"black": (34, 32, 38), "teal": (10, 112, 122), "pink": (238, 150, 176)}
POSITIONS = {"left": 10.0, "middle": 15.5, "right": 21.0}  # x of the centre, px
GOLD = (250, 186, 66)
CENTRE_Y = 15.5
JITTER = 1.0  # px, on the centre
SIZES = (6.0, 9.0)  # px
RIM = 2.0  # px, width of the rim
GRAIN = 2  # px, side of a grain block
GRAIN_LEVELS = 18.0  # grey levels, +- on every block

TEMPLATES = (
    "a {colour} {shape} on the {position}, {background} background",
    "{shape} in {colour}, {position} side, over {background}",
    "on {background} there is a {colour} {shape} at the {position}",
    "{position}: one {colour} {shape}, backdrop {background}",
)


@dataclass(frozen=True)
class Attributes:
    """What a caption says. Each field is a key of the tables above."""

    shape: str
    colour: str
    background: str
    position: str

    def caption(self, template: int = 0) -> str:
        return TEMPLATES[template].format(**vars(self))


ALL_ATTRIBUTES = tuple(Attributes(s, c, b, p) for s in SHAPES for c in COLOURS for b in BACKGROUNDS for p in POSITIONS)
# Balanced groups of attributes, so that no picture is asked for in two of them.
SPLITS = ("training", "validation", "pickapic_test", "parti_prompts")


def _group(attributes: Attributes) -> str:
    """A third of all is for training; the rest is shared out by background and position."""
    tables = (SHAPES, tuple(COLOURS), tuple(BACKGROUNDS), tuple(POSITIONS))
    *first, background, position = (t.index(v) for t, v in zip(tables, vars(attributes).values(), strict=True))
    if (sum(first) + background + position) % 3 == 0:
        return SPLITS[0]
    return SPLITS[1 + (background + 2 * position) % 3]


def split(name: str) -> list[Attributes]:
    """The attributes of one split: every shape, colour, background and position equally often."""
    if name not in SPLITS:
        raise ValueError(f"split is {name!r}; expected one of {', '.join(SPLITS)}")
    return [a for a in ALL_ATTRIBUTES if _group(a) == name]


OF_CAPTION = {a.caption(t): a for a in ALL_ATTRIBUTES for t in range(len(TEMPLATES))}


def signed_distance(shape: str, size, dx, dy) -> np.ndarray:
    """Distance (px) to the outline, negative inside; the arguments broadcast. dy points down."""
    if shape == "circle":
        return np.hypot(dx, dy) - size
    if shape == "triangle":  # apex up
        sides = (np.abs(dx) * 1.75 - (dy + size)) / np.hypot(1.75, 1.0)
        return np.maximum(sides, dy - 0.75 * size)
    if shape == "cross":
        x, y, arm = np.abs(dx), np.abs(dy), 0.3 * size
        return np.minimum(np.maximum(x - size, y - arm), np.maximum(y - size, x - arm))
    raise ValueError(f"shape is {shape!r}; expected one of {', '.join(SHAPES)}")


def ground(colour, rng: np.random.Generator) -> np.ndarray:
    """A background [32, 32, 3] with its grain."""
    blocks = RESOLUTION // GRAIN
    grain = GRAIN_LEVELS * rng.choice([-1.0, 1.0], size=(blocks, blocks))
    return np.asarray(colour) + np.kron(grain, np.ones((GRAIN, GRAIN)))[..., None]


def render(attributes: Attributes, rng: np.random.Generator, glow=None, size=None, rim_width=RIM):
    """One picture [32, 32, 3] uint8 and what its caption does not say, {"glow": .., "size": ..}."""
    glow = float(rng.beta(0.8, 1.2)) if glow is None else glow
    size = float(rng.uniform(*SIZES)) if size is None else size
    cx = POSITIONS[attributes.position] + rng.uniform(-JITTER, JITTER)
    cy = CENTRE_Y + rng.uniform(-JITTER, JITTER)
    image = ground(BACKGROUNDS[attributes.background], rng)
    y, x = np.mgrid[0:RESOLUTION, 0:RESOLUTION]
    distance = signed_distance(attributes.shape, size, x - cx, y - cy)
    rim = glow * np.clip(rim_width + 0.5 - distance, 0, 1)[..., None]
    image = (1 - rim) * image + rim * np.asarray(GOLD)
    body = np.clip(0.5 - distance, 0, 1)[..., None]
    image = (1 - body) * image + body * np.asarray(COLOURS[attributes.colour])
    return np.clip(np.round(image), 0, 255).astype(np.uint8), {"glow": glow, "size": size}


def render_many(num_images: int, seed: int):
    """Of uniformly drawn captions: pictures [n, 32, 32, 3] uint8, captions, attributes, and [n, 2] glow and size."""
    rng = np.random.default_rng(seed)
    drawn = [ALL_ATTRIBUTES[i] for i in rng.integers(len(ALL_ATTRIBUTES), size=num_images)]
    templates = rng.integers(len(TEMPLATES), size=num_images)
    captions = [a.caption(t) for a, t in zip(drawn, templates, strict=True)]
    images, hidden = zip(*(render(a, rng) for a in drawn), strict=True)
    return np.stack(images), captions, drawn, np.array([[h["glow"], h["size"]] for h in hidden], np.float32)
