"""`ceiling`, `sample` and `decode` at their tiny size: what they write, and that nothing wrong is timed. No timing."""

import argparse
import json
from dataclasses import replace

import pytest
import torch
from toy import quiet  # noqa: F401

from pso import bench, bench_ceiling, bench_decode, bench_networks, bench_rows, bench_sample
from pso.bench_rows import Rate, Variant
from pso.bench_sample import Fast
from pso.provenance import UserError, hardware
from pso.timing import Peak

CPU = torch.device("cpu")
TINY = ("--device", "cpu", "--size", "tiny", "--rounds", "2")


def ran(out, name: str, *options: str) -> tuple[dict, str]:
    bench.main([name, *TINY, *options, "--out", str(out)])
    return json.loads((out / f"{name}.json").read_text()), (out / f"{name}.md").read_text()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """By benchmark; sampling once before there is a ceiling."""
    out = tmp_path_factory.mktemp("benchmarks")
    found = {"without": ran(out, "sample", "--batches", "1")}
    found["ceiling"] = ran(out, "ceiling", "--batch", "1", "--note", "Nothing else ran.")
    found["sample"] = ran(out, "sample", "--batches", "1", "3", "--pictures")
    found["decode"] = ran(out, "decode", "--batches", "2")
    return found


def options(**more) -> argparse.Namespace:
    given = {"size": "tiny", "resolution": 32, "sampler": "renoise", "batches": [2], "pictures": False}
    return argparse.Namespace(**{**given, "compile": False, "rounds": 2, **more})


# ---- what is written ----


@pytest.mark.parametrize("name", ["ceiling", "sample", "decode"])
def test_it_says_what_was_measured_and_where(told, name, tmp_path):
    import platform

    found, text = told[name]
    assert found["benchmark"] == name and found["device"] == "cpu"
    assert {"versions", "hardware", "code", "clocks", "note"} <= set(found)
    assert found["command"].startswith(f"python -m pso.bench {name} --device cpu --size tiny") and (
        found["command"] in text
    )
    assert platform.node() not in json.dumps(found) + text and str(tmp_path.parent) not in json.dumps(found) + text


def test_the_command_gives_the_same_options_again(told):
    words = told["sample"][0]["command"].split()[3:]
    parser = argparse.ArgumentParser()
    parser.add_argument("benchmark")
    bench_sample.add_arguments(parser)
    again = parser.parse_args(words)
    assert (again.batches, again.pictures, again.resolution, again.rounds) == ([1, 3], True, 32, 2)


@pytest.mark.parametrize(("name", "part"), [("sample", "rows"), ("decode", "decode"), ("decode", "encode")])
def test_a_row_adds_up(told, name, part):
    found = told[name][0]
    rate = told["ceiling"][0]["matmul"]["tflops"] * 1e12
    for row in found[part]:
        assert "invalid" not in row and len(row["seconds"]) == row["rounds"] == 2
        assert row["median_s"] == pytest.approx(sum(row["seconds"]) / 2, abs=1e-6)
        assert row["pictures_per_s"] == pytest.approx(row["pictures"] / row["median_s"], rel=1e-3, abs=1e-3)
        assert row["mfu"] == pytest.approx(row["flops"] / row["median_s"] / rate, rel=1e-2, abs=1e-4)
        assert row["limit"] is None or row["difference"] <= row["limit"]


def test_every_variant_has_a_row(told):
    names = [row["variant"] for row in told["sample"][0]["rows"]]
    assert names[0] == "diffusers' pipeline, batch 1"
    assert names[1:] == [
        f"{v}, batch {b}" for v in ("plain", "channels_last", "LoRA added to the weights") for b in (1, 3)
    ]
    assert {row["ratio_to"] for row in told["sample"][0]["rows"]} == {names[0]}
    for part in ("decode", "encode"):
        rows = {row["variant"]: row for row in told["decode"][0][part]}
        assert "bfloat16, channels_last, batch 2" in rows and rows["float32, batch 2"]["difference"] == 0
        tiny = rows["tiny VAE, float32: another function, batch 2"]
        assert tiny["limit"] is None and tiny["difference"] > 1e-3
    assert any(row["difference"] > 0 for row in told["decode"][0]["decode"] if "bfloat16" in row["variant"])


def test_pictures_cost_the_decoders_work(told):
    def work(name):
        return next(row["flops"] for row in told[name][0]["rows"] if row["variant"] == "plain, batch 1")

    assert work("sample") - work("without") == bench_networks.vae_flops("tiny", 32, "decode")
    assert work("without") == 4 * bench_networks.call_flops("tiny", 32)


def test_the_ceiling_has_a_row_for_each_shape_and_kernel(told):
    found, text = told["ceiling"]
    assert found["matmul"]["tflops"] > 0 and found["copy"]["tb_per_s"] > 0 and "Nothing else ran." in text
    rows = {(row["shape"], row["backend"]): row for row in found["attention"]}
    assert len(rows) == 4 * 4
    for shape in bench_ceiling.SHAPES:
        assert rows[shape, "math"]["forward"]["tflops"] > 0 and rows[shape, "math"]["both"]["tflops"] > 0
        assert rows[shape, "cudnn"]["invalid"].startswith("refused: "), "a CPU has no such kernel"
        assert "forward" not in rows[shape, "cudnn"]
    assert "refused: " in text


def test_attention_that_is_wrong_is_not_timed(monkeypatch):
    right = bench_ceiling.attend
    monkeypatch.setattr(bench_ceiling, "attend", lambda q, k, v: right(q, k, v, scale=0.1))
    row = bench_ceiling.attention(CPU, "tiny", 1, 1)[3]
    assert row["backend"] == "math" and row["invalid"].startswith("differs by") and "forward" not in row


# ---- MFU only with a ceiling of this device ----


def test_no_ceiling_no_mfu(told):
    found, text = told["without"]
    assert all(row["mfu"] is None and row["median_s"] > 0 for row in found["rows"])
    assert "no ceiling; run `python -m pso.bench ceiling` first" in text and "%" not in text


def test_only_the_same_devices_ceiling_counts(tmp_path):
    def rate(**changes):
        told = {"matmul": {"tflops": 2.0}, "device": "cpu", "hardware": hardware(), **changes}
        (tmp_path / "ceiling.json").write_text(json.dumps(told))
        return bench_rows.measured_rate(tmp_path, CPU)

    assert rate() == Rate(2e12)
    for changes in (
        {"device": "cuda"},
        {"hardware": hardware() | {"gpus": ["another"]}},
        {"hardware": hardware() | {"threads": 99}},
    ):
        assert rate(**changes).flops is None and "another device's" in rate(**changes).reason
    assert "cannot be read" in rate(matmul=None).reason
    (tmp_path / "ceiling.json").write_text('{"matmul"')
    assert "cannot be read" in bench_rows.measured_rate(tmp_path, CPU).reason


# ---- the same function first ----


def test_a_fast_variant_that_samples_otherwise_is_not_timed(monkeypatch):
    right = bench_networks.new_policy

    def wrong(*given, speed=None, **more):
        policy, chain = right(*given, speed=speed, **more)
        if speed is not None and speed.channels_last:
            with torch.no_grad():
                policy.unet.conv_out.weight.mul_(1.001)
        return policy, chain

    monkeypatch.setattr(bench_networks, "new_policy", wrong)
    fast = [Fast("wrong", {"channels_last": True}), Fast("right", {"merge_lora": True})]
    made = bench_sample.variants(options(), CPU, fast)
    rows = {row["variant"]: row for row in bench_rows.rows(made, 1, CPU, Rate(1e9))}
    wrong = rows["wrong, batch 2"]
    assert "differs by" in wrong["invalid"] and not {"median_s", "seconds", "ratio", "mfu"} & set(wrong)
    assert rows["right, batch 2"]["median_s"] > 0, "each has networks of its own"
    table = bench_rows.table(list(rows.values()), "")
    assert table.count("invalid: differs by") == 1


def test_in_16_bits_as_on_a_gpu(monkeypatch):
    """Every variant runs in bfloat16, diffusers' loop with a LoRA in it as well."""
    monkeypatch.setattr(bench_networks, "short", lambda device: torch.bfloat16)
    fast = [Fast("16", {"lora_compute": "base"}), Fast("merged", {"merge_lora": True})]
    made = bench_sample.variants(options(batches=[1], pictures=True), CPU, fast)
    rows = {row["variant"]: row for row in bench_rows.rows(made, 1, CPU, Rate(None))}
    assert [name for name, row in rows.items() if "invalid" in row] == ["merged, batch 1"]
    assert rows["merged, batch 1"]["invalid"].startswith("refused: a LoRA cannot be added to weights in torch.bfloat16")
    assert rows["16, batch 1"]["difference"] < 0.05


@pytest.mark.parametrize("sampler", ["renoise", "ancestral"])
def test_both_loops_give_the_same_latents(sampler):
    assert bench_sample.loops_apart(options(sampler=sampler), CPU) < 1e-5


def test_other_noise_in_the_steps_is_noticed(monkeypatch):
    monkeypatch.setattr(bench_sample, "keyed_seed", lambda *key: 1)
    made = bench_sample.variants(options(), CPU, [])
    assert "differs by" in bench_rows.rows(made[:1], 1, CPU, Rate(None))[0]["invalid"]


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_a_vae_that_gives_other_pictures_is_not_timed(what, monkeypatch):
    right = bench_decode.made

    def wrong(vae, way, which):
        model = right(vae, way, which)
        if way.channels_last and way.dtype == torch.float32:
            coder = model.decoder if which == "decode" else model.encoder
            coder.conv_out.weight.data.mul_(1.05)
        return model

    monkeypatch.setattr(bench_decode, "made", wrong)
    rows = bench_decode.timed(options(rounds=1), CPU, what, Rate(None), {})
    assert [row["variant"] for row in rows if "invalid" in row] == ["float32, channels_last, batch 2"]


def test_no_number_is_never_equal():
    def named(name, difference, limit=1.0):
        return Variant(name, lambda: None, 1, 1, difference, limit)

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def refused():
        raise RuntimeError("no kernel for this\nand more")

    made = [named("plain", lambda: 0.0), named("nan", lambda: float("nan")), named("much", out_of_memory)]
    rows = bench_rows.rows([*made, named("none", refused)], 1, CPU, Rate(None))
    assert [row.get("invalid", "")[:20] for row in rows] == [
        "",
        "differs by nan, more",
        "memory ran out",
        "refused: no kernel f",
    ]
    json.dumps(rows, allow_nan=False)


def test_ratios_are_by_picture_and_to_the_first_that_is_right(monkeypatch):
    monkeypatch.setattr(bench_rows, "abab", lambda variants, *_: {"b": [2.0, 4.0], "c": [4.0, 8.0]})
    monkeypatch.setattr(bench_rows, "peak", lambda device: __import__("contextlib").nullcontext(Peak()))
    a, b, c = (
        Variant(name, lambda: None, count, 10, lambda: 0.0, 0.0) for name, count in (("a", 1), ("b", 1), ("c", 6))
    )
    rows = bench_rows.rows([replace(a, difference=lambda: 1.0), b, c], 2, CPU, Rate(10.0))
    assert [row.get("ratio") for row in rows] == [None, 1.0, 3.0] and rows[2]["ratio_to"] == "b"
    assert rows[1]["mfu"] == pytest.approx(10 / 3.0 / 10.0, abs=1e-4)


# ---- random networks ----


def test_the_adapter_is_no_zero_and_outputs_are_finite():
    policy, chain = bench_networks.new_policy("tiny", 32, CPU, torch.float32)
    second = [p for name, p in policy.unet.named_parameters() if ".lora_B." in name]
    assert second and all(bool((p != 0).all()) for p in second)
    x0 = bench_sample.ours(policy, chain, bench_networks.condition(policy, 2), 0, 2)
    pictures = policy.decode(x0)
    assert bool(torch.isfinite(x0).all()) and 10 < pictures.float().std() < 120, "neither grey nor black and white"


def test_full_size_work_is_that_of_the_published_counts():
    """spec/performance.md, 1.1 to 1.3: TFLOP of a sample."""
    found = [
        bench_networks.call_flops("full", 512),
        bench_networks.call_flops("full", 512, None),
        bench_networks.vae_flops("full", 512, "decode"),
        bench_networks.vae_flops("full", 1024, "decode", True),
    ]
    assert [f / 1e12 for f in found] == pytest.approx([1.600, 1.5888, 2.515, 0.565], rel=1e-3)


# ---- options ----


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("sample", "--batches", "0"), ("decode", "--rounds", "0"), ("ceiling", "--batch", "-1")],
)
def test_numbers_below_one_are_a_sentence(name, option, value, tmp_path):
    with pytest.raises(SystemExit, match=f"bench: {option} is {value}; expected numbers of at least 1"):
        bench.main([name, *TINY, option, value, "--out", str(tmp_path)])


@pytest.mark.parametrize("device", ["cuda:99", "nothing", "meta"])
def test_a_device_that_is_not_there_is_a_sentence(device):
    with pytest.raises(UserError, match=f"--device is '{device}' .*expected cpu, or cuda where there is one"):
        bench_networks.check_arguments(argparse.Namespace(device=device, rounds=1))
