"""Metrics that compare a picture with others. Such a scorer says with which, and is given them beside its pictures:

compared_with = "pictures"   the real pictures of the picture's subject
                "untuned"    the picture that the untuned model made of the same prompt and noise
                "siblings"   the same row's other pictures of the same prompt, from other noise

score(images, prompts, others) -> Tensor [B], others[i] the list for images[i]
"""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

COMPARED_WITH = ("pictures", "untuned", "siblings")


def mean_cosine(features: Callable, images: list[Image.Image], others: list[list[Image.Image]]) -> Tensor:
    """Mean cosine [B] of each picture with its others; features(images) gives unit vectors [B, D]."""
    distinct = {id(other): other for row in others for other in row}
    of = dict(zip(distinct, features(list(distinct.values())), strict=True))
    rows = [torch.stack([of[id(other)] for other in row]) for row in others]
    return torch.stack([(row @ mine).mean() for row, mine in zip(rows, features(images), strict=True)])
