"""Pictures as the scorers' networks see them, without torchvision: one named preset per official transform.

A preset takes a Pillow picture of any mode and the side that the network wants (224 for every published one) and
gives float32 [3, size, size]. To the bit:

    clip_pil224             transformers' processor: RGB, shorter side by Pillow's bicubic, centre crop rounded down
    openai_pil224           OpenAI's, open_clip's and ImageReward's: resized and cropped in the picture's own mode, then
                            RGB (palettes and 16 bits come out otherwise); crop rounded to even
    hps_letterbox224_noaa   the HPSv2 code's, vendored by Diffusion-DPO and PSO: float tensor, longer side by torch's
                            bicubic, padded. Without antialias under torchvision <= 0.16, as with the paper's 0.15.2 ...
    hps_letterbox224_aa     ... and with it under every later one
    dino_256_224            DINO's evaluation: RGB, shorter side to 256, centre crop 224, ImageNet's mean and std

Transparency is dropped, as `convert("RGB")` does. The HPSv2 code keeps it and then fails in the network, as it does
on a picture whose longer side is 224 already and whose shorter is not; here such a picture is padded like all others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_tensor(image: Image.Image) -> Tensor:
    """Picture -> float [3, H, W] in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 255


def normalise(x: Tensor, mean=CLIP_MEAN, std=CLIP_STD) -> Tensor:
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


def shorter_side_to(image: Image.Image, size: int) -> Image.Image:
    """By Pillow's bicubic; the longer side is rounded down, as torchvision and transformers do."""
    shorter = min(image.size)
    if shorter == size:
        return image
    return image.resize(tuple(int(size * side / shorter) for side in image.size), Image.Resampling.BICUBIC)


def centre(image: Image.Image, size: int, rounded=round) -> Image.Image:
    """The central `size` x `size`. torchvision rounds half a pixel to even, transformers down."""
    left, top = (int(rounded((side - size) / 2)) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def clip_pil224(image: Image.Image, size: int = 224) -> Tensor:
    return normalise(to_tensor(centre(shorter_side_to(image.convert("RGB"), size), size, np.floor)))


def openai_pil224(image: Image.Image, size: int = 224) -> Tensor:
    return normalise(to_tensor(centre(shorter_side_to(image, size), size)))


def dino_256_224(image: Image.Image, size: int = 224) -> Tensor:
    resized = shorter_side_to(image.convert("RGB"), size * 256 // 224)
    return normalise(to_tensor(centre(resized, size)), IMAGENET_MEAN, IMAGENET_STD)


def hps_letterbox224_noaa(image: Image.Image, size: int = 224) -> Tensor:
    return _letterbox(image, size, antialias=False)


def hps_letterbox224_aa(image: Image.Image, size: int = 224) -> Tensor:
    return _letterbox(image, size, antialias=True)


def _letterbox(image: Image.Image, size: int, antialias: bool) -> Tensor:
    """Bicubic overshoot is not clamped; black is padded before normalising."""
    x = to_tensor(image)
    scale = size / max(x.shape[1:])
    if scale != 1:
        target = tuple(round(side * scale) for side in x.shape[1:])
        x = F.interpolate(x[None], target, mode="bicubic", align_corners=False, antialias=antialias)[0]
    down, right = size - x.shape[1], size - x.shape[2]
    return normalise(F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2)))


PRESETS = {
    f.__name__: f for f in (clip_pil224, openai_pil224, hps_letterbox224_noaa, hps_letterbox224_aa, dino_256_224)
}


# ---- batches ----

_batch: ContextVar[dict | None] = ContextVar("batch", default=None)


@contextmanager
def one_batch() -> Iterator[None]:
    """In here what several scorers make of the same pictures is made once; nobody may change a picture."""
    token = _batch.set({})
    try:
        yield
    finally:
        _batch.reset(token)


def shared(images: list[Image.Image], key: Any, make: Callable[[], Tensor]) -> Tensor:
    """make(), or in one_batch() what it gave for these very pictures and this key."""
    kept = _batch.get()
    if kept is None:
        return make()
    key = (key, *map(id, images))
    if key not in kept:
        kept[key] = (make(), list(images))  # with the pictures: an id is not used again while its owner lives
    return kept[key][0]


def pixels(images: list[Image.Image], preset: str, size: int) -> Tensor:
    """[B, 3, size, size] by a preset's name."""
    return shared(images, (preset, size), lambda: torch.stack([PRESETS[preset](image, size) for image in images]))
