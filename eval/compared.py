"""Metrics that compare a picture with others. Their entry says with which (`compared_with` in metrics.yaml), and
they are given them beside the pictures:

pictures   the real pictures of the picture's subject
untuned    the picture that the untuned model made of the same prompt and noise
siblings   the same row's other pictures of the same prompt, from other noise

score(images, prompts, others) -> Tensor [B], others[i] the list for images[i]
"""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor


def mean_cosine(features: Callable, images: list[Image.Image], others: list[list[Image.Image]]) -> Tensor:
    """Mean cosine [B] of each picture with its others; features(images) gives unit vectors [B, D]."""
    return torch.stack([(row @ mine).mean() for mine, row in vectors(features, images, others)])


def mean_distance(features: Callable, images: list[Image.Image], others: list[list[Image.Image]]) -> Tensor:
    """Mean of 1 - cosine [B]: of unit vectors half the squared distance, which is 0 for a picture and itself."""
    return torch.stack([(row - mine).square().sum(-1).mean() / 2 for mine, row in vectors(features, images, others)])


def vectors(features: Callable, images: list[Image.Image], others: list[list[Image.Image]]) -> list[tuple]:
    """(vector [D], those of its others [K, D]) per picture; a picture that comes more than once is looked at once."""
    mine = features(images)
    of = {id(image): vector for image, vector in zip(images, mine, strict=True)}
    more = {id(other): other for row in others for other in row if id(other) not in of}
    if more:
        of |= zip(more, features(list(more.values())), strict=True)
    return [(vector, torch.stack([of[id(other)] for other in row])) for vector, row in zip(mine, others, strict=True)]
