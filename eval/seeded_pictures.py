"""Pictures and prompts on which implementations of a scorer may differ: odd sizes, modes and texts, made by rule."""

import hashlib
import inspect

import numpy as np
from PIL import Image, ImageDraw

PROMPTS = (
    "a red cat sitting on a wooden table",
    "a painting of an ocean with clouds and birds, day time, low depth field effect",
    "",
    "   \n\t ",
    "two dogs and three horses under a dark sky " * 3,  # beyond BERT's 35 tokens
    "an old castle on a mountain by the sea at night, oil painting, detailed, realistic, " * 12,  # beyond CLIP's 77
    "the conductor’s “red” hat",
    "a glass &amp; a table, 5 &lt; 6 &quot;cats&quot;",
    "a cat,a dog!and a robot?",
    "A PORTRAIT OF A WOMAN HOLDING A BIRD",
    "a \U0001f600 robot \U0001f431 with a ☃ and 2️⃣ suns",
    "café naïve Über straße 日本語",
    "a  street   with    cars",
    "it's the dog's house; they'll walk, he'd run - 1234567890",
    "a man wearing a blue & yellow_coat (8k) {{{hd}}} #style @artist 50% off ***",
    "ﬁne ½ cup … — a dog",
    "[V] a small [V] cat in the snow",
    "cat",
    "robot",
    "white light over the black water, ocean, photo",
)


def scene(width: int, height: int, seed: int) -> Image.Image:
    """Gradients, discs and grain, from whole numbers alone, so that every platform draws the same."""
    y, x = np.indices((height, width))
    rng = np.random.default_rng(seed)
    tilt, levels = rng.integers(1, 5, 3), rng.integers(0, 160, 3)
    planes = [
        levels[c] + 95 * (tilt[c] * x * height + y * width) // max(width * height * (tilt[c] + 1), 1) for c in range(3)
    ]
    picture = np.stack(planes, -1)
    for _ in range(6):
        cx, cy, r = rng.integers(0, width), rng.integers(0, height), max(min(width, height) // rng.integers(3, 12), 1)
        picture[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = rng.integers(0, 256, 3)
    picture = picture + rng.integers(-6, 7, picture.shape)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def checkerboard(side: int) -> Image.Image:
    return Image.fromarray((np.indices((side, side)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")


def thin_lines(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), (240, 240, 235))
    for i in range(0, width, 17):
        ImageDraw.Draw(image).line((i, 0, width - i, height), fill=(i % 256, 40, 90))
    return image


def deep(width: int, height: int, seed: int) -> Image.Image:
    """16 bits; half of it would be above 255 if it were read as 8."""
    grey = np.asarray(scene(width, height, seed).convert("L")).astype(np.uint16)
    return Image.fromarray(grey * 2)


def with_alpha(width: int, height: int, seed: int, mode: str) -> Image.Image:
    image = scene(width, height, seed).convert(mode)
    image.putalpha(scene(width, height, seed + 100).convert("L"))
    return image


def pictures() -> dict[str, Image.Image]:
    """Forty, by what is odd about each."""
    found = {
        "512 px": scene(512, 512, 0),
        "wide": scene(300, 200, 1),
        "grey": scene(300, 300, 2).convert("L"),
        "palette": scene(260, 230, 3).quantize(64),
        "RGBA": with_alpha(256, 256, 4, "RGB"),
        "16 bits": deep(300, 260, 5),
        "checkerboard": checkerboard(500),
        "227 x 224, half a pixel to crop": scene(227, 224, 6),
        "tiny": scene(20, 30, 7),
        "grey with alpha": with_alpha(240, 200, 8, "L"),
        "1 bit": scene(301, 299, 9).convert("1"),
        "CMYK": scene(320, 250, 10).convert("CMYK"),
        "thin lines": thin_lines(640, 481),
        "tall": scene(200, 300, 11),
        "224 px": scene(224, 224, 12),
        "224 x 160, longer side as wanted": scene(224, 160, 13),
        # beyond the first sixteen, which the golden scores are of
        "1024 px": scene(1024, 1024, 14),
        "1024 x 768": scene(1024, 768, 15),
        "1024 px thin lines": thin_lines(1024, 1024),
        "1000 px checkerboard": checkerboard(1000),
        "229 x 224": scene(229, 224, 16),
        "224 x 227": scene(224, 227, 17),
        "225 x 231": scene(225, 231, 18),
        "481 x 640": scene(481, 640, 19),
        "640 x 481": scene(640, 481, 20),
        "panorama": scene(900, 120, 21),
        "banner": scene(90, 700, 22),
        "7 x 5": scene(7, 5, 23),
        "2 px": scene(2, 2, 33),
        "black": Image.new("RGB", (256, 256)),
        "white": Image.new("RGB", (300, 256), (255, 255, 255)),
        "odd grey": scene(301, 223, 24).convert("L"),
        "palette with transparency": scene(210, 333, 25).quantize(17),
        "RGBA odd": with_alpha(333, 217, 26, "RGB"),
        "16 bits, wide": deep(500, 224, 27),
        "1 bit, wide": scene(450, 226, 28).convert("1"),
        "160 x 224": scene(160, 224, 29),
        "767 x 511": scene(767, 511, 30),
        "448 px": scene(448, 448, 31),
        "223 px": scene(223, 223, 32),
    }
    found["palette with transparency"].info["transparency"] = 3
    return found


def pairs(count: int | None = None) -> tuple[list[str], list[Image.Image], list[str]]:
    """Names, pictures and a prompt for each of the first `count` pictures."""
    made = dict(list(pictures().items())[:count])
    return list(made), list(made.values()), [PROMPTS[i % len(PROMPTS)] for i in range(len(made))]


def digest_of(images: list[Image.Image]) -> str:
    """sha256 of modes, sizes and pixels."""
    found = hashlib.sha256()
    for image in images:
        found.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return found.hexdigest()


def compared(scorer, images: list[Image.Image]) -> list:
    """What score() is given beside pictures and prompts: for one that compares, the next three of each picture."""
    if "others" not in inspect.signature(scorer.score).parameters:
        return []
    return [[[images[(i + k) % len(images)] for k in (1, 2, 3)] for i in range(len(images))]]
