"""Exact counts of an update on the small model, ours and the peers', and their gradients before anything is timed.

They hold on every machine. What they catch: a network call too many, an encode, a read that a GPU would wait for.
"""

import functools
import math

import pytest
import torch
from toy import quiet  # noqa: F401

from pso import bench_step, bench_updates
from pso.bench_updates import COMPARISONS, TOLERANCE, Pair, Size, difference
from pso.counting import Counts, counted
from pso.peers.released_pso import ReleasedPso
from pso.peers.script import Form

P, K = 4, 3
ROWS = 2 * P * K
# of one row at 16 x 16 latents, in FLOPs: theta forward and backward, what checkpoints form again, pre forward
THETA, BACKWARD, AGAIN, PRE = 492_316_672, 462_756_864, 343_652_352, 484_364_288
ENCODED = 280_395_776  # a picture of 128 px
KEPT = 7_688_800  # bytes of one row


@functools.cache  # seconds
def pair_of(name: str, micro_batch: int | None = None) -> Pair:
    return Pair(name, Size(pairs=P, steps=K, micro_batch=micro_batch), torch.device("cpu"), torch.float32)


@functools.cache
def of_ours(name: str, micro_batch: int | None = None) -> Counts:
    """Of an update."""
    pair = pair_of(name, micro_batch)
    with counted(pair.pipeline) as counts:
        pair.our_update()
    return counts


@functools.cache
def of_theirs(name: str, pairs: int | None = None, gradient_checkpointing: bool = False) -> Counts:
    """As released, or in micro-batches of some pairs."""
    pair = pair_of(name)
    with counted(pair.peer.pipeline) as counts:
        pair.their_update(Form(pairs, gradient_checkpointing) if pairs else pair.released())
    return counts


# ---- the same function first ----


@pytest.mark.parametrize("name", ["diffusers-dpo", "mapo"])  # the others on a smaller network, tests/test_peers.py
def test_the_gradients_agree_before_anything_is_timed(name):
    assert difference(name) < TOLERANCE


def test_a_peer_of_another_function_is_found_out():
    class Swapped(ReleasedPso):
        def step_loss(self, target, reference, text, tied):
            return super().step_loss(reference, target, text, tied)

    assert difference("online", of=Swapped) > 0.1


# ---- network calls ----


def test_network_calls_of_an_online_update():
    """4 K P / b of the release, ours 2 ceil(2 K P / B): 24 and 2."""
    b, ours, theirs = 2, of_ours("online"), of_theirs("online")
    assert pair_of("online").released() == Form(b, gradient_checkpointing=True)
    assert (ours.theta_calls, ours.pre_calls) == (1, 1) and ours.unet_calls == 2
    assert theirs.unet_calls == 4 * K * P // b == 24 and theirs.theta_calls == theirs.pre_calls
    assert ours.theta_rows == ours.pre_rows == theirs.theta_rows == theirs.pre_rows == ROWS


def test_network_calls_in_micro_batches():
    """In chunks ours runs theta twice, the first time without a graph, and pre once: the sum is inside the sigmoid."""
    counts = of_ours("online", micro_batch=6)
    chunks = 2 * math.ceil(K * P / 6)
    assert (counts.theta_calls, counts.pre_calls) == (2 * chunks, chunks)


@pytest.mark.parametrize(
    ("name", "theta", "pre", "theta_rows"),
    [("offline", K * P // 2, K * P // 2, ROWS), ("diffusers-dpo", 1, 1, 2 * P), ("spo", K * P, K * P, ROWS),
     ("mapo", 1, 0, 2 * P)],
)  # fmt: skip
def test_network_calls_of_the_other_peers(name, theta, pre, theta_rows):
    theirs, ours = of_theirs(name), of_ours(name)
    assert (theirs.theta_calls, theirs.pre_calls, theirs.theta_rows) == (theta, pre, theta_rows)
    assert (ours.theta_calls, ours.pre_calls, ours.theta_rows) == (1, min(pre, 1), theta_rows)


def test_tuning_a_peer_leaves_calls_that_batching_saves():
    assert of_theirs("online", P).unet_calls == 4 * K


# ---- work ----


def test_flops_of_an_update():
    """No row costs us more than theta forward and backward and pre forward; checkpoints form theta once more."""
    for name in ("online", "offline", "spo"):
        assert of_ours(name).flops == ROWS * (THETA + BACKWARD + PRE), name
    assert of_ours("mapo").flops == 2 * P * (THETA + BACKWARD), "pre never runs"
    released = of_theirs("online").flops
    assert released == ROWS * (THETA + BACKWARD + AGAIN + PRE)
    assert released / of_ours("online").flops == pytest.approx(1.237, rel=2e-3)
    assert of_theirs("online", P).flops == of_ours("online").flops


def test_flops_of_an_update_that_encodes():
    assert of_theirs("offline").flops == ROWS * (THETA + BACKWARD + AGAIN + PRE) + 2 * P * ENCODED


def test_the_benchmarks_own_figures_of_work_are_those_counted():
    """Of the GPU's tables they are counted on the meta device instead, tests/test_flops.py."""
    for name in COMPARISONS:
        pair = pair_of(name)
        assert bench_step.needed(pair) == of_ours(name).flops
        assert bench_step.done(pair, pair.released()) == pytest.approx(of_theirs(name).flops, rel=1e-9)


# ---- encodes and loads ----


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_warm_update_of_ours_encodes_and_loads_nothing(name):
    counts = of_ours(name)
    assert counts.pictures_encoded == counts.pictures_decoded == counts.prompts_encoded == counts.model_loads == 0


@pytest.mark.parametrize(
    ("name", "pictures", "prompts"),
    [("online", 0, 0), ("offline", 2 * P, 0), ("diffusers-dpo", 2 * P, P), ("spo", 0, 0), ("mapo", 2 * P, P)],
)
def test_what_a_peer_encodes_in_every_update(name, pictures, prompts):
    counts = of_theirs(name)
    assert (counts.pictures_encoded, counts.prompts_encoded) == (pictures, prompts)


def test_cold_ours_encodes_each_picture_and_each_caption_once():
    """The caches' part of a run of 8 updates on 16 pairs, against a script's."""
    policy, updates = pair_of("mapo").policy, 8
    with counted(policy.pipeline) as counts:
        for _ in range(2):
            policy.encode_images(torch.zeros(16, 128, 128, 3, dtype=torch.uint8))
        policy.encode_prompts([f"a cat {i}" for i in range(16)])
    assert (counts.pictures_encoded, counts.prompts_encoded) == (32, 16)
    theirs = of_theirs("mapo")
    assert (updates * theirs.pictures_encoded, updates * theirs.prompts_encoded) == (64, 32)


def test_spo_holds_a_second_unet():
    with counted(bench_updates.random_pipeline(128, torch.device("cpu"), torch.float32)) as counts:
        Pair("spo", Size(), torch.device("cpu"), torch.float32)
    spo = counts.model_loads
    with counted(bench_updates.random_pipeline(128, torch.device("cpu"), torch.float32)) as counts:
        Pair("online", Size(), torch.device("cpu"), torch.float32)
    assert spo == counts.model_loads + 1, "one copy of a UNet more"


# ---- syncs ----


@pytest.mark.parametrize("name", COMPARISONS)
def test_ours_waits_for_the_network_at_most_once_in_an_update(name):
    assert of_ours(name).host_syncs <= 1


@pytest.mark.parametrize("name", ["offline", "mapo"])
def test_gradient_clipping_and_step_wait_at_most_once(name):
    pair = pair_of(name)
    loop = pair.loop
    batch = loop.source.batch(0)
    parameters = pair.policy.lora_parameters()
    with counted(pair.pipeline) as counts:
        loop.objective.backward(batch, loop.given.condition)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        loop.optimizer.step()
    loop.optimizer.zero_grad()
    assert counts.host_syncs <= 1


@pytest.mark.parametrize(
    ("name", "reads"),
    [("online", K * P // 2), ("offline", P // 2), ("diffusers-dpo", 4), ("spo", K * P // 2), ("mapo", 6)],
)
def test_reads_of_the_peers(name, reads):
    assert of_theirs(name).host_syncs == reads


# ---- bytes ----


def test_bytes_that_an_update_keeps_for_its_backward_pass():
    """Ours all rows at once, the release a step of two pairs with checkpoints, tuned a step of all pairs."""
    ours = of_ours("online").saved_bytes
    assert ours == pytest.approx(ROWS * KEPT, rel=2e-3)
    assert of_theirs("online", P).saved_bytes == pytest.approx(2 * P * KEPT, rel=2e-3)
    released = of_theirs("online").saved_bytes
    assert released == pytest.approx(4 * 995_904, rel=0.02)


def test_a_micro_batch_bounds_what_ours_keeps():
    assert of_ours("online", micro_batch=6).saved_bytes == pytest.approx(6 * KEPT, rel=2e-3)


def test_aten_operations_of_an_update_are_fewer_than_the_peers():
    """An upper bound for ours; the release makes an operation of its own for each micro-step."""
    ours, theirs = of_ours("online").operations, of_theirs("online").operations
    assert ours <= 14_000 and theirs > 10 * ours
