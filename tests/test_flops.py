"""Counted work against figures derived elsewhere, formulas by hand, and the published numbers of parameters."""

import json

import pytest
import torch
from torch import nn

from pso import architectures, bench_count, flops
from pso.provenance import ROOT

TERA = 1e12
UNITS = (("visit", ""), ("picture", ", 4 steps"), ("picture", ", 1 step"))


def near(expected: float):
    return pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: flops.unet(1024), 6.7612),  # not 5.98, which leaves attention's products out
        (lambda: flops.unet(512), 1.5888),
        (lambda: flops.decode(1024), 10.470),
        (lambda: flops.decode(512), 2.515),
        (lambda: flops.encode(1024), 4.879),
        (lambda: flops.encode(512), 1.117),
        (lambda: flops.prompt(), 0.0133 + 0.0979),
        (lambda: flops.clip_image("clip_h14"), 0.3346),
        (lambda: flops.clip_text("clip_h14"), 0.0471),
        (lambda: flops.clip_image("clip_l14"), 0.1620),
    ],
)
def test_the_forward_pass_of_each_network(call, expected):
    assert call().total / TERA == near(expected)


@pytest.mark.parametrize(
    ("side", "rank", "forward", "backward"),
    [(1024, 16, 6.803, 7.777), (1024, 64, 6.927, 8.023), (512, 16, 1.600, 1.593)],
)
def test_a_loras_backward_pass_is_little_more_than_its_forward(side, rank, forward, backward):
    one, other = flops.lora(side, rank)
    assert (one.total / TERA, other.total / TERA) == (near(forward), near(backward))
    assert other.attention == 2.5 * one.attention, "5 products for 2, as fused kernels have it"


def test_a_checkpoint_forms_most_of_the_forward_pass_again():
    """Not all of it: nothing is formed of the layers before the first LoRA."""
    forward, backward = flops.lora(512, 16, True)
    assert (forward.total + backward.total) / TERA == near(4.379)


def test_attention_by_hand():
    """Self-attention of 64 x 64 and 32 x 32 tokens, cross-attention with 77, heads of 64: 4 L K C per layer."""
    layers = {(64 * 64, 640): 2 * 2 + 3 * 2, (32 * 32, 1280): 2 * 10 + 10 + 3 * 10}  # down, (mid,) up
    expected = sum(4 * tokens * (tokens + 77) * width * count for (tokens, width), count in layers.items())
    assert flops.unet(1024).attention == expected


def test_a_multiply_add_is_two():
    linear, conv = nn.Linear(3, 5, device="meta"), nn.Conv2d(2, 4, 3, padding=1, device="meta")
    assert flops.count(lambda: linear(torch.empty(7, 3, device="meta"))) == flops.Work(2 * 7 * 3 * 5, 0)
    assert flops.count(lambda: conv(torch.empty(1, 2, 6, 6, device="meta"))).total == 2 * 36 * 4 * 2 * 9
    q = torch.empty(1, 2, 8, 16, device="meta")
    assert flops.count(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == flops.Work(
        *[4 * 2 * 8 * 8 * 16] * 2
    )
    assert flops.count(lambda: None) == flops.Work(0, 0)


def test_numbers_of_parameters_are_the_published_ones():
    assert bench_count.sizes() | {"LCM": architectures.parameters(architectures.unet(guidance_embedding=True))} == {
        "UNet": 2_567_463_684,
        "LCM": 2_567_463_684 + 256 * 320,  # a projection without bias
        "VAE": 83_653_863,
        "text encoders": 123_060_480 + 694_659_840,
        "clip_h14": 986_109_441,
        "clip_l14": 427_616_513,
        "clip_b32": 151_277_313,
    }


def test_units_add_up():
    of = {name: 1 for name in committed()["flops"]}
    found = bench_count.units(of)
    assert (
        found["visit 1024 px"] == 3 and found["picture 512 px, 4 steps"] == 5 and found["picture 512 px, 1 step"] == 2
    )
    assert (
        found["picture 1024 px, 50 steps with guidance"] == 101 and found["score of a picture by the paper's four"] == 4
    )


# ---- the committed figures ----


def committed() -> dict:
    return json.loads((ROOT / "results" / "benchmarks" / "count.json").read_text())


def test_the_committed_figures_are_those_of_this_code():
    told = committed()["flops"]
    assert told["UNet 512 px, forward"] == flops.unet(512).total and told["DINO"] == flops.dino().total
    assert told["ImageReward"] == flops.image_reward().total
    assert told | bench_count.units(told) == told, "the units are sums of the calls"
    assert told["visit 1024 px"] / TERA == near(21.341) and told["visit 512 px"] / TERA == near(4.782)
