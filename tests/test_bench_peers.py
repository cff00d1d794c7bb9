"""The benchmarks of steps, peers, rounds and CPUs at small size: what they write and what they refuse. No timing."""

import json
import platform
from types import SimpleNamespace

import pytest
import torch
from toy import quiet  # noqa: F401

from eval import bench_pictures
from pso import bench, bench_cpu, bench_peers, bench_step
from pso.bench_model import drawn, networks, policy_of, published_speed, random_pipeline
from pso.bench_updates import COMPARISONS, Form, Size, chain_of
from pso.mdp import Ancestral, Renoise
from pso.provenance import UserError, hardware

CPU = torch.device("cpu")


def made(out, *options: str) -> tuple[dict, str]:
    bench.main([*options, "--out", str(out)])
    name = options[0]
    return json.loads((out / f"{name}.json").read_text()), (out / f"{name}.md").read_text()


def of_no_machine(told: dict, text: str, folder) -> None:
    content = json.dumps(told) + text
    assert platform.node() not in content and "/tmp" not in content and str(folder) not in content
    assert {"command", "versions", "hardware", "code"} <= set(told) and told["command"] in text


@pytest.fixture
def same_function(monkeypatch):
    """What tests/test_counts.py compares is not compared again."""
    for module in (bench_peers, bench_step):
        monkeypatch.setattr(module, "difference", lambda name, ancestral=False: 1e-13)


def test_peers_in_turns(tmp_path, same_function):
    told, text = made(tmp_path, "peers", "--only", "mapo", "--rounds", "2", "--pairs", "2")
    found = told["comparisons"]["mapo"]
    assert list(found["rows"]) == list(bench_peers.VARIANTS)
    assert all(len(taken) == 2 and min(taken) > 0 for taken in found["seconds"].values())
    ours, released = found["seconds"]["ours"], found["seconds"]["as released"]
    assert found["ratio"]["as released"] == pytest.approx(
        sum(b / a for a, b in zip(ours, released, strict=True)) / 2, rel=2e-3
    )
    assert set(found["ratio"]) == {"ours again", "as released", "tuned"}
    assert found["rows"]["ours"]["mfu"] is None, "no ceiling of a CPU is told"
    assert (found["counts"]["ours"]["pictures_encoded"], found["counts"]["tuned"]["pictures_encoded"]) == (0, 4)
    assert found["micro_batch_pairs"]["as released"] == 2 and found["micro_batch_pairs"]["tuned"] in (1, 2)
    assert str(found["ratio"]["tuned"]) in text
    of_no_machine(told, text, tmp_path)


def test_what_computes_something_else_has_no_time(tmp_path, monkeypatch):
    for module in (bench_peers, bench_step):
        monkeypatch.setattr(module, "difference", lambda name, ancestral=False: 1e-9)
        monkeypatch.setattr(module, "Pair", lambda *_: pytest.fail("it was built"))
    told, text = made(tmp_path, "peers", "--only", "spo", "--rounds", "1")
    assert told["comparisons"]["spo"]["invalid"] and "seconds" not in told["comparisons"]["spo"]
    assert "invalid: gradients differ by 1.0e-09" in text
    told, text = made(tmp_path, "step", "--impl", "spo", "--rounds", "1")
    assert told["invalid"] and "median_s" not in told and "Invalid, not timed." in text


@pytest.mark.parametrize("wrong", [float("nan"), 1e-9])
def test_a_difference_that_is_no_number_is_invalid_too(wrong, monkeypatch):
    monkeypatch.setattr(bench_peers, "difference", lambda name, ancestral=False: wrong)
    assert bench_peers.compared("mapo", Size(), CPU, torch.float32, 1)["invalid"]


@pytest.mark.parametrize("form", [["--as-released"], ["--micro-batch", "1"]])
def test_one_step(tmp_path, same_function, form):
    told, text = made(tmp_path, "step", "--impl", "mapo", "--rounds", "2", "--pairs", "2", *form)
    assert told["n"] == 2 and told["rows_per_s"] == pytest.approx(4 / told["median_s"], rel=1e-2)
    assert told["checkpointing"] == (form == ["--as-released"]) and told["micro_batch_pairs"] == (
        2 if form == ["--as-released"] else 1
    )
    assert str(told["median_s"]) in text and "mfu" not in text
    of_no_machine(told, text, tmp_path)


def test_a_round_of_online_pso(tmp_path):
    options = ("--rounds", "1", "--pairs", "1", "--round-pairs", "2", "--timesteps", "1")
    told, text = made(tmp_path, "online-epoch", *options)
    assert set(told["ratio"]) == {"ours again", "as released", "tuned"} and min(told["ratio"].values()) > 0
    of_no_machine(told, text, tmp_path)


def test_on_a_cpu(tmp_path, same_function):
    options = ("--rounds", "1", "--pairs", "1", "--pictures", "2", "--threads", "1", "--only", "mapo")
    told, text = made(tmp_path, "cpu", *options, "--note", "Nothing else ran.")
    pictures = told["generation_and_scoring"]
    assert pictures["difference_grey_levels"] <= 1 and pictures["ratio"] > 0
    assert f"**{pictures['ratio']} times as fast**" in text and "Nothing else ran." in text
    for one in told["comparisons"]["mapo"]["peak_rss_gib"].values():
        assert 0.1 < one["loaded"] <= one["most"] < 8
    of_no_machine(told, text, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["peers", "--pairs", "0"], "--pairs is 0; expected a number of at least 1"),
        (["step", "--micro-batch", "all"], "--micro-batch is 'all'; expected auto or a number"),
        (["peers", "--resolution", "512", "--device", "cpu"], "--resolution is 512 with --device cpu; expected 128"),
        (["online-epoch", "--round-pairs", "6"], "--round-pairs is 6; expected a multiple of --pairs .4."),
        (["step", "--speed", "fast"], "--speed is 'fast'; expected settings as JSON"),
        (["step", "--speed", "[1]"], "--speed is '.1.'; expected settings as JSON"),
        (["peers", "--speed", '{"compile": 3}', "--only", "mapo"], "--speed"),
        (["cpu", "--threads", "0"], "--threads is 0; expected a number of at least 1"),
    ],
)
def test_what_cannot_be_is_a_sentence(options, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        bench.main([*options, "--out", str(tmp_path)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="--device is cuda, but torch sees no GPU"):
        bench.main(["peers", "--device", "cuda", "--out", str(tmp_path)])


def test_the_released_forms_are_those_of_the_scripts():
    online = COMPARISONS["online"]
    assert online.form(1024, 32) == Form(2, True) and online.form(512, 32) == Form(4, True)
    assert online.form(1024, 1) == Form(1, True), "an update has no more pairs"
    assert COMPARISONS["spo"].form(512, 32) == Form(2, False)
    assert COMPARISONS["mapo"].form(1024, 32) == COMPARISONS["diffusers-dpo"].form(512, 32) == Form(8, True)


def test_ours_runs_as_the_scales_do_unless_asked_otherwise():
    asked = SimpleNamespace(device="cpu", speed='{"channels_last": true}')
    speed = bench_step.asked_speed(asked)
    assert speed.channels_last and speed.merge_lora == published_speed(CPU).merge_lora
    assert published_speed(torch.device("cuda")).lora_compute == "base" != published_speed(CPU).lora_compute


def test_a_lora_with_masters_is_awake_too():
    pipeline = random_pipeline(128, CPU, torch.bfloat16)
    policy = policy_of(pipeline, 128, 4, published_speed(torch.device("cuda")))
    assert all(p.dtype is torch.float32 and bool(p.detach().abs().sum() > 0) for p in policy.lora_parameters())
    held = [p for name, p in policy.unet.named_parameters() if "lora_B" in name]
    assert all(p.dtype is torch.bfloat16 and bool(p.detach().abs().sum() > 0) for p in held)


def test_the_sampler_of_a_size():
    assert isinstance(chain_of(512, 3), Ancestral) and type(chain_of(1024, 3)) is type(chain_of(128, 3)) is Renoise
    assert chain_of(1024, 3).times[1:].flip(0).tolist() == [999, 749, 499, 249]
    assert chain_of(1024, 7).trained_steps == [8, 7, 6, 5, 4, 3, 2]


def test_the_ceiling_is_read_where_it_was_measured(tmp_path):
    path, gpu = tmp_path / "ceiling.json", torch.device("cuda")
    assert bench_step.ceiling(gpu, tmp_path) is None
    told = {"device": "cuda", "matmul": {"tflops": 700.0}, "hardware": hardware()}
    path.write_text(json.dumps(told))
    assert bench_step.ceiling(gpu, tmp_path) == 7e14 and bench_step.ceiling(CPU, tmp_path) is None
    path.write_text(json.dumps(told | {"device": "cpu"}))
    assert bench_step.ceiling(gpu, tmp_path) is None
    path.write_text(json.dumps(told | {"hardware": hardware() | {"gpus": ["another"]}}))
    assert bench_step.ceiling(gpu, tmp_path) is None


def test_share_of_the_ceiling_and_prediction():
    """At full size: 8 rows in 1 s at a ceiling of 100 TFLOP/s; the peer is predicted to do more, but shares no more."""
    size = SimpleNamespace(resolution=512, rank=16, pairs=4)
    pair = SimpleNamespace(
        size=size, rows=8, module=SimpleNamespace(NEEDS_PRE=True), compared=COMPARISONS["diffusers-dpo"]
    )
    ours, released = (bench_step.row(pair, [1.0], 1e14, form) for form in (None, Form(8, True)))
    assert ours["mfu"] == released["mfu"] == pytest.approx(8 * 4.782e12 / 1e14, rel=1e-3)
    assert ours["predicted_s"] == pytest.approx(8 * 4.782e-2, rel=1e-3)
    assert released["predicted_s"] == pytest.approx(8 * 5.968e-2 + 8 * 1.117e-2 + 4 * 0.1112e-2, rel=1e-3)


# ---- random networks ----


def test_random_networks_are_neither_zero_nor_absurd():
    policy = policy_of(random_pipeline(128, CPU, torch.float32), 128, 4)
    assert all(bool(p.detach().abs().sum() > 0) for p in policy.lora_parameters()), "LoRA's B too"
    condition = policy.encode_prompts(["a cat", "two dogs"])
    assert 0.1 < condition.hidden.std() < 10 and not torch.allclose(condition.pooled[0], condition.pooled[1])
    eps = policy.eps(Renoise([999]), torch.tensor([1, 1]), torch.randn(2, 4, 16, 16), condition)
    assert 0.05 < eps.detach().std() < 5
    images = policy.decode(torch.randn(1, 4, 16, 16)).float()
    assert images.shape == (1, 128, 128, 3) and images.std() > 1


def test_a_buffer_without_a_value_is_noticed():
    with torch.device("meta"):
        norm = torch.nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="the buffer running_mean of BatchNorm1d has no value"):
        drawn(norm, CPU, torch.float32)


def test_full_sizes_have_the_published_networks():
    assert sum(p.numel() for p in networks(1024).unet().parameters()) == 2_567_463_684
    with pytest.raises(UserError, match="--resolution is 256; expected one of 128, 512, 1024"):
        networks(256)


def test_pictures_that_differ_between_the_ways_are_not_timed(monkeypatch):
    policy, scorer, prompts = bench_cpu._pictures(2)
    assert bench_pictures.difference(policy, scorer, prompts) <= 1
    start = bench_pictures._start
    monkeypatch.setattr(bench_pictures, "_start", lambda policy, i: start(policy, i + 1))
    with pytest.raises(UserError, match="pictures of the two ways differ by .* grey levels; nothing was timed"):
        bench_pictures.difference(policy, scorer, prompts)
