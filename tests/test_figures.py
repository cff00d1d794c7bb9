"""Sample grids and curves: what is shown, where, and how large."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from synthetic import EVAL_SETS, NAIVE, NUM_PROMPTS, ROWS, config, png, write_images

from eval.figures import FOOT, GAP, HEAD, LABEL, columns, curves, enlarged, evenly, read_probes, samples, save, write
from pso import paths
from pso.entries import UNTUNED
from pso.provenance import UserError

SHOWN = ["SDXL", "SDXL-DMD2", NAIVE.label, "Offline-PSO w/ SDXL-DMD2", "Online-PSO w/ SDXL-DMD2"]
SIZE = 32


def probe(update: int, **more) -> str:
    return json.dumps({"event": "probe", "update": update, "kl": {"2": 0.5 * update, "3": 0.25 * update}, **more})


def tree(results, cfg=None):
    cfg = cfg or config()
    for row in columns(cfg):
        for eval_set in EVAL_SETS:
            write_images(cfg, results, row, eval_set, SIZE)
        if row.method != UNTUNED:
            run = paths.run_dir(cfg.scale, "preference", row.model, row.method, 0, results)
            reward = {"reward": 0.2} if row.method == "pso_online" else {}
            (run / "train.jsonl").write_text("\n".join([probe(0, **reward), probe(10, **reward)]) + "\n")
    return cfg


def test_columns_are_in_order():
    assert [row.label for row in columns(config())] == SHOWN


def test_evenly():
    names = [f"{i:03d}" for i in range(11)]
    assert evenly(names[::-1], 6) == ["000", "002", "004", "006", "008", "010"]
    assert evenly(names[:2], 6) == names[:2]


def test_samples_show_the_pixels(tmp_path):
    cfg = tree(tmp_path)
    path = save(samples(cfg, tmp_path, "pickapic_test"), tmp_path / "samples.png")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    side = SIZE * ((1600 - LABEL) // len(SHOWN) // SIZE)
    side = min(side, 256)
    assert pixels.shape == (HEAD + 6 * (side + GAP) + FOOT, LABEL + 5 * (side + GAP), 3)
    prompts = np.linspace(0, NUM_PROMPTS - 1, 6).round().astype(int)
    factor = side // SIZE
    for i, prompt in enumerate(prompts):
        for k, label in enumerate(SHOWN):
            top, left = HEAD + i * (side + GAP), LABEL + k * (side + GAP)
            picture = pixels[top : top + side, left : left + side]
            small = picture[::factor, ::factor]
            assert (picture == small.repeat(factor, 0).repeat(factor, 1)).all()  # nearest neighbour
            assert (small[0] == (255, 0, 0)).all()  # not upside down
            assert (small[1:, len(label) % SIZE] == 255).all()  # the row's own column of pixels
            assert small[5, 1].tolist() == [5 * prompt] * 3  # the same prompt over the line


def test_files_are_legible_and_the_same_twice(tmp_path):
    cfg = tree(tmp_path)
    written = write(cfg, tmp_path)
    assert [path.name for path in written] == ["samples_pickapic_test.png", "samples_parti_prompts.png", "curves.png"]
    first = [path.read_bytes() for path in written]
    for data in first:
        assert 600 < Image.open(io.BytesIO(data)).width <= 1600
    assert [path.read_bytes() for path in write(cfg, tmp_path)] == first


def test_large_pictures_are_averaged_down():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 200
    assert enlarged(png(stripes), 128).shape == (128, 128, 3)
    assert abs(enlarged(png(stripes), 128).astype(int) - 100).max() <= 1


def test_missing_images_name_the_command(tmp_path):
    with pytest.raises(
        UserError, match="holds no shard.*of 'SDXL'; make them with `python -m eval.generate --model sdxl"
    ):
        samples(config(), tmp_path, "pickapic_test")


def test_a_row_with_fewer_images_is_refused(tmp_path):
    cfg = tree(tmp_path)
    run = paths.run_dir(cfg.scale, "preference", "sdxl_dmd2", "pso_online", 0, tmp_path)
    (paths.images_dir(run, "pickapic_test", 4) / "shard0.parquet").unlink()
    with pytest.raises(UserError, match="images with seed 0 for 6 prompts of 'Online-PSO .*missing: p"):
        samples(cfg, tmp_path, "pickapic_test")


def test_probes(tmp_path):
    path = tmp_path / "train.jsonl"
    lines = [
        probe(10, reward=0.3),
        json.dumps({"event": "update", "update": 10, "loss": 1.0}),
        probe(0),
        probe(10, reward=0.4),
    ]
    path.write_text("\n".join(lines))
    found = read_probes(path)
    assert found["update"].to_list() == [0, 10]
    assert found["kl"].to_list() == [0.0, 7.5]
    assert np.isnan(found["reward"].iloc[0]) and found["reward"].iloc[1] == 0.4  # the later entry of update 10
    path.write_text(probe(0) + '\n{"event": "pro')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_probes(path)


def test_curves_show_every_run_and_say_what_is_not_there(tmp_path):
    cfg = tree(tmp_path)
    run = paths.run_dir(cfg.scale, "preference", "sdxl_dmd2", "diffusion", 0, tmp_path)
    (run / "train.jsonl").unlink()
    figure = curves(cfg, tmp_path)
    reward, kl, both = figure.axes
    assert [line.get_label() for line in kl.get_lines()] == SHOWN[2:]
    assert kl.get_lines()[1].get_ydata().tolist() == [0.0, 7.5]
    assert both.get_lines()[2].get_xdata().tolist() == [0.0, 7.5]
    assert reward.get_lines()[2].get_ydata().tolist() == [0.2, 0.2]
    told = figure.get_suptitle().replace("\n", " ")
    assert "No probes: Naive fine-tune w/ SDXL-DMD2." in told
    assert "No reward measured: Offline-PSO w/ SDXL-DMD2." in told
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in kl.get_lines()}
    assert len({marker for _, marker, _ in styles}) == len({colour for colour, _, _ in styles}) == 3
    assert ROWS[1].label not in told
