"""Examples of the documents, as printed, in a copy of the project folder at scale smoke: a method, a model and a metric
of one's own into a table, and a LoRA in plain diffusers."""

import io
import json
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import run
from documents import FENCE, ROOT, commands_of, examples_of, text_of
from PIL import Image

from pso.config import load
from pso.evidence import Evidence
from pso.paths import images_dir, run_dir

SHOWN_IN = ("README.md", "workflow/README.md", "eval/metrics/README.md")
CODE = ("baselines", "envs", "eval", "pso", "workflow")
LORA = "results/smoke/preference/sdxl_dmd2/{}/seed0/lora/pytorch_lora_weights.safetensors"
KEYS = ["eval_set", "label"]


def at_smoke(text: str) -> str:
    return text.replace("miniature", "smoke")


def shown() -> dict[str, str]:
    return {path: text for name in SHOWN_IN for path, text in examples_of(text_of(name)).items()}


def commands() -> list[list[str]]:
    """Those that take one of the files."""
    found = [words for name in SHOWN_IN for words in commands_of(text_of(name), "snakemake")]
    return [words for words in found if "--configfile" in words and words[-1] in shown()]


def test_each_example_is_whole():
    """Settings that a command takes, and every module that they name."""
    files = shown()
    names = ["colourfulness.py", "colourfulness.yaml", "half.yaml", "ipo.py", "ipo.yaml"]
    assert sorted(files) == [f"mine/{name}" for name in names]
    assert sorted(words[-1] for words in commands()) == [path for path in sorted(files) if path.endswith(".yaml")]
    for path, text in files.items():
        if path.endswith(".yaml"):
            config = load(yaml.safe_load(text))
            assert set(re.findall(r"^  (\w+):$", text.partition("tables:")[2], re.MULTILINE)) <= set(config.tables)
        for module in re.findall(r"module: (mine\.\w+)", text):
            assert f"{module.replace('.', '/')}.py" in files


# ---- the loss ----


@pytest.fixture
def ipo(tmp_path, monkeypatch):
    (tmp_path / "shown_ipo.py").write_text(shown()["mine/ipo.py"])
    monkeypatch.syspath_prepend(tmp_path)
    import shown_ipo

    yield shown_ipo
    del sys.modules["shown_ipo"]


def test_the_loss_stops_at_its_margin(ipo):
    """One pair that has reached 1 / (2 beta), in float64, and one that has gone as far the wrong way."""
    cfg = ipo.Config(beta=50.0, timestep_mode="trajectory_sum")
    ratio = torch.tensor([[0.002, 0.003, 0.005], [-0.002, -0.003, -0.005]], dtype=torch.float64, requires_grad=True)
    value, log = ipo.loss(Evidence(ratio=ratio), Evidence(ratio=torch.zeros(2, 3, dtype=torch.float64)), None, cfg)
    (grad,) = torch.autograd.grad(value, ratio)
    assert value.item() == pytest.approx((0 + 4) / 2) and log["arrived"] <= 0.5
    assert grad[0].abs().max() < 1e-9 and grad[1] == pytest.approx(torch.full((3,), -200.0, dtype=torch.float64))


# ---- the workflow ----


@pytest.fixture(scope="module")
def made(smoke, tmp_path_factory):
    """The project folder after `make`, with the files that the documents show; then every command."""
    folder = shutil.copytree(smoke, tmp_path_factory.mktemp("example") / "pso-bench")
    for name in CODE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "CITATION.cff", folder)  # what a model card cites
    (folder / "mine").mkdir()
    for path, text in shown().items():
        (folder / path).write_text(at_smoke(text))
    for words in commands():
        done = run("snakemake", *words, "--config", "scale=smoke", cwd=folder, PYTHONPATH=str(folder))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def table(folder, name: str) -> pd.DataFrame:
    frame = pd.read_csv(folder / f"results/smoke/tables/{name}.csv")
    assert frame["status"].isna().all()
    return frame.set_index(KEYS)


def pictures(folder, model: str, method: str, eval_set: str) -> list[np.ndarray]:
    shards = sorted(
        images_dir(run_dir("smoke", "preference", model, method, 0, folder / "results"), eval_set, 4).iterdir()
    )
    frame = pd.concat([pd.read_parquet(shard) for shard in shards if shard.suffix == ".parquet"])
    return [np.asarray(Image.open(io.BytesIO(png)), dtype=float) for png in frame.sort_values("image_id")["png"]]


def test_the_method_is_a_row_beside_those_that_were_there(smoke, made):
    rows = table(made, "mine")
    assert len(rows) == 6 and rows[["pick_score", "clip_score", "image_reward", "sharpness"]].notna().all(axis=None)
    before = pd.read_csv(smoke / "results/smoke/tables/table1.csv").set_index(KEYS)
    for label, printed in (("SDXL-DMD2", "SDXL-DMD2"), ("Offline-PSO", "Offline-PSO w/ SDXL-DMD2")):
        for eval_set in ("pickapic_test", "parti_prompts"):
            assert rows.loc[(eval_set, label), "pick_score"] == before.loc[(eval_set, printed), "pick_score"]
    trained = made / LORA.format("ipo")
    record = json.loads((trained.parent.parent / "run.json").read_text())
    asked = yaml.safe_load(shown()["mine/ipo.yaml"])["methods"]["ipo"]["tune"]
    assert record["steps"]["done"] == asked["num_updates"]
    updates = [json.loads(line) for line in (trained.parent.parent / "train.jsonl").read_text().splitlines()]
    updates = [line for line in updates if line["event"] == "update"]
    assert updates[0]["loss"] == pytest.approx(1.0) and "arrived" in updates[-1]  # theta is pre at first: (0 - 1)^2
    assert np.mean([line["margin"] for line in updates[-30:]]) > updates[0]["margin"]  # one batch's is noisy


def test_nothing_that_was_finished_is_trained_again(smoke, made):
    for method in ("pso_offline", "pso_online", "diffusion"):
        assert (made / LORA.format(method)).stat().st_mtime == (smoke / LORA.format(method)).stat().st_mtime


def test_the_model_is_between_those_that_it_is_made_of(made):
    rows = table(made, "half")
    assert len(rows) == 6 and rows[["pick_score", "clip_score", "image_reward", "sharpness"]].notna().all(axis=None)
    none, half, whole = (
        np.stack(pictures(made, model, method, "parti_prompts"))
        for model, method in (("sdxl_dmd2", "untuned"), ("sdxl_dmd2_half", "untuned"), ("sdxl_dmd2", "pso_offline"))
    )
    assert 0 < np.abs(half - none).mean() < np.abs(whole - none).mean()


def test_the_metric_is_a_column_with_the_numbers_of_its_pictures(made):
    rows = table(made, "colours")
    for eval_set in ("pickapic_test", "parti_prompts"):
        found = []
        for r, g, b in (np.moveaxis(picture, -1, 0) for picture in pictures(made, "sdxl_dmd2", "diffusion", eval_set)):
            rg, yb = r - g, 0.5 * r + 0.5 * g - b
            found.append(np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2))
        assert rows.loc[(eval_set, "Naive fine-tune"), "colourfulness"] == pytest.approx(np.mean(found), rel=1e-5)
    assert "Colourfulness" in (made / "results/smoke/tables/colours.md").read_text()


# ---- plain diffusers ----


def test_a_lora_loads_in_plain_diffusers_as_printed(smoke, tmp_path):
    (block,) = [block for block in FENCE.findall(text_of("README.md")) if "load_lora_weights" in block]
    (tmp_path / "results").symlink_to(smoke / "results", target_is_directory=True)
    told = 'print("moved", sum(p.abs().sum().item() for n, p in pipe.unet.named_parameters() if "lora_B" in n) > 0)\n'
    (tmp_path / "block.py").write_text(at_smoke(block) + told)
    done = run(sys.executable, "block.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "moved True" in done.stdout
    picture = np.asarray(Image.open(tmp_path / "red_circle.png"))
    assert picture.shape == (32, 32, 3) and picture.std() > 5
