"""The benchmark of scoring at tiny size: what it writes, and that it times nothing that scores otherwise. No timing."""

import json

import pandas as pd
import pytest
import torch
from test_pictures import encoded, noise
from toy import quiet  # noqa: F401

from eval import bench_score
from eval.bench_score import METRICS, WAYS, differences
from eval.pictures import Pictures
from pso import bench
from pso.provenance import UserError


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmarks")
    options = ("--pictures", "3", "--size", "40", "--rounds", "2", "--note", "Nothing else ran.")
    bench.main(["score", *options, "--out", str(out)])
    return json.loads((out / "score.json").read_text()), (out / "score.md").read_text()


def test_it_says_what_was_measured_and_how(told):
    found, _ = told
    assert found["metrics"] == list(METRICS) and len(METRICS) == 5
    assert found["command"] == "python -m pso.bench score --pictures 3 --size 40 --rounds 2"
    assert {"versions", "hardware", "code", "load_before_and_after", "note"} <= set(found)
    assert found["hardware"]["threads"] >= 1 and "torch" in found["versions"]
    assert set(found["seconds"]) == set(found["pictures_per_second"]) == set(found["peak_rss_gib"]) == set(WAYS)
    for name, seconds in found["seconds"].items():
        assert len(seconds) == 2 and min(seconds) > 0
        assert found["pictures_per_second"][name] == pytest.approx(3 / (sum(seconds) / 2), rel=0.01)
        memory = found["peak_rss_gib"][name]
        assert 0.1 < memory["networks_loaded"] <= memory["most"] < 8
    assert found["ratio"] > 0


def test_both_ways_gave_the_same_scores_first(told):
    assert set(told[0]["max_abs_diff"]) == set(METRICS)
    assert all(0 <= difference <= 1e-5 for difference in told[0]["max_abs_diff"].values())


def test_no_host_and_no_path_of_the_machine(told, tmp_path):
    import platform

    content = json.dumps(told[0]) + told[1]
    assert platform.node() not in content and "/tmp" not in content and str(tmp_path.parent) not in content


def test_the_text_shows_the_figures(told):
    found, text = told
    assert f"**{found['ratio']} times as fast**" in text and "Nothing else ran." in text and found["command"] in text
    for name in WAYS:
        assert str(found["pictures_per_second"][name]) in text


class Stub:
    """A scorer of widths; `wrong` when it sees more than one picture at once."""

    def __init__(self, wrong: float):
        self.wrong, self.text = wrong, {"kept": 1}

    def score(self, images, prompts):
        more = self.wrong if len(images) > 1 else 0.0
        return torch.tensor([image.width + more for image in images], dtype=torch.float64)


@pytest.fixture
def pictures():
    data = [encoded(noise(20 + k, 12)) for k in range(3)]
    frame = pd.DataFrame({"image_id": list("abc"), "prompt": list("xyz"), "prompt_id": list("xyz")})
    return Pictures(frame, lambda row: data[row], "make it again")


@pytest.mark.parametrize("wrong", [0.0, 1e-6, 2e-5, float("nan")])
def test_a_scorer_that_depends_on_its_batch_is_not_timed(pictures, wrong):
    if wrong < TOLERATED:
        assert differences(pictures, {"a": Stub(0.0), "b": Stub(wrong)})["b"] == pytest.approx(wrong)
        return
    with pytest.raises(
        UserError, match="b (differs by 2e-05 between the two ways; nothing was timed|of image a is not)"
    ):
        differences(pictures, {"a": Stub(0.0), "b": Stub(wrong)})


TOLERATED = bench_score.TOLERANCE


def test_texts_are_forgotten_between_turns():
    scorer = Stub(0.0)
    bench_score.forget(scorer)
    assert scorer.text == {}
    bench_score.forget(object())


@pytest.mark.parametrize("option", ["--pictures", "--size", "--rounds"])
def test_numbers_below_one_are_a_sentence(option, tmp_path):
    with pytest.raises(SystemExit, match=f"bench: {option} is 0; expected a number of at least 1"):
        bench.main(["score", option, "0", "--out", str(tmp_path)])
