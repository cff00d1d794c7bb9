"""Sample grids and curves: which there are, what is shown, where, and how large."""

import io
import json
import math
import re
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from synthetic import EVAL_SETS, NAIVE, NUM_PROMPTS, ROWS, config, png, table, write_images, write_tree

from eval.curves import curves, read_probes, runs
from eval.figures import to_latex, write
from eval.grids import FOOT, GAP, HEAD, LABEL, Line, Picture, enlarged, evenly, of_subjects, samples, sheet
from eval.style import Drawn, method_style, save
from pso import figures, paths
from pso.config import load
from pso.dreambooth import PROMPT_FILE
from pso.entries import UNTUNED, DatasetEntry, MethodEntry, ModelEntry, Row, TuneConfig
from pso.figures import figure_names, short
from pso.hub import hub_dir
from pso.provenance import UserError

SIZE = 32
GRID = "samples_sdxl_dmd2_4steps_pickapic_test"
SHOWN = ["SDXL-DMD2", "Offline-PSO w/ SDXL-DMD2", "Online-PSO w/ SDXL-DMD2"]
MODULES = {"pso_offline": "pso.pso_offline", "pso_online": "pso.pso_online", "diffusion": "baselines.diffusion"}


def built(**changes):
    """synthetic's configuration with the methods' own modules, by which figures tell them apart."""
    tune = TuneConfig(num_updates=10, batch_size=1, learning_rate=1.0e-5)
    methods = {
        name: MethodEntry.model_construct(title=name, module=module, data="pairs", reward=None, objective={}, tune=tune)
        for name, module in MODULES.items()
    }
    models = {
        name: ModelEntry.model_construct(title=title, tuned_steps=4)
        for name, title in (("sdxl", "SDXL"), ("sdxl_dmd2", "SDXL-DMD2"))
    }
    return config(**({"methods": methods, "models": models} | changes))


def probe(update: int, **more) -> str:
    return json.dumps({"event": "probe", "update": update, "kl": {"2": 0.5 * update, "3": 0.25 * update}, **more})


def run_of(cfg, results, method):
    return paths.run_dir(cfg.scale, "preference", "sdxl_dmd2", method, 0, results)


def run_file(folder, **cost) -> None:
    """What figures read of a run's record."""
    record = {"cost": {"wall_s": 7200.0, "unet_forwards": 100, **cost}, "hardware": {"cpus": 2}, "processes": 1}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record))


def tree(results, cfg=None):
    """Images, scores, probes and records of every row."""
    cfg = cfg or built()
    write_tree(cfg, results)
    for row in cfg.table_entries["table1"].shown_rows:
        for seed in cfg.seeds if row.method != UNTUNED else ():
            run_file(paths.run_dir(cfg.scale, "preference", row.model, row.method, seed, results))
    for row in cfg.table_entries["table1"].shown_rows:
        for eval_set in EVAL_SETS:
            write_images(cfg, results, row, eval_set, SIZE)
        if row.method != UNTUNED:
            reward = {"reward": 0.2} if row.method == "pso_online" else {}
            sharp = {"metrics": {"sharpness": 90.0}} if row.method == "diffusion" else {}
            lines = [probe(0, **reward, **sharp), probe(10, **reward, **sharp)]
            (run_of(cfg, results, row.method) / "train.jsonl").write_text("\n".join(lines) + "\n")
    return cfg


def grid_of(cfg, name=GRID):
    return next(grid for grid in figures.grids(cfg) if grid.name == name)


# ---- which figures there are ----


def test_figures_of_a_table_are_its_rows_naive_against_pso_and_many_steps_against_few():
    found = {grid.name: [row.label for row in grid.rows] for grid in figures.grids(built())}
    assert found == {
        GRID: SHOWN,
        "samples_sdxl_dmd2_4steps_parti_prompts": SHOWN,
        "naive_against_pso_sdxl_dmd2_pickapic_test": [SHOWN[0], NAIVE.label, *SHOWN[1:]],
        "many_steps_against_sdxl_dmd2_pickapic_test": ["SDXL", *SHOWN],
    }
    (shown,) = figures.curves(built())
    assert (shown.name, [row.label for row in shown.rows]) == ("curves_sdxl_dmd2", [NAIVE.label, *SHOWN[1:]])


def test_extra_rows_that_are_not_naive_have_a_grid_of_their_own():
    other = Row(label="DPO w/ SDXL-DMD2", model="sdxl_dmd2", method="dpo", steps=4)
    methods = {**built().methods, "dpo": MethodEntry.model_construct(title="DPO", module="baselines.diffusion_dpo")}
    cfg = built(table_entries={"table1": table(extra_rows=[other, NAIVE])}, methods=methods)
    grid = grid_of(cfg, "samples_sdxl_dmd2_4steps_more_pickapic_test")
    assert [row.label for row in grid.rows] == ["SDXL-DMD2", NAIVE.label, other.label]


def test_a_table_without_rows_has_no_figures():
    missing = [row.model_copy(update={"missing": "not built yet"}) for row in [*ROWS, NAIVE]]
    assert figure_names(built(table_entries={"table1": table(rows=missing, extra_rows=[])})) == []


@pytest.mark.parametrize("tables", [["table1"], ["table2"], ["table3"], ["style"], ["table1", "validation", "table4"]])
def test_names_follow_the_tables_and_stand_once(tables):
    names = figure_names(load({"tables": tables}))
    assert names and len(set(names)) == len(names)
    alone = [figure_names(load({"tables": [one]})) for one in tables]
    assert sorted(names) == sorted(name for every in alone for name in every)


def test_two_tables_of_one_model_keep_their_figures_apart():
    cfg = built(tables=["table1", "again"], table_entries={"table1": table(), "again": table()})
    names = [grid.name for grid in figures.grids(cfg)]
    assert GRID in names and f"{GRID}_again" in names and len(set(names)) == 8


def test_tables_that_differ_in_steps_alone_have_grids_for_both_and_curves_once():
    names = figure_names(load({"tables": ["table2"]}))
    assert {"samples_sdxl_turbo_4steps_pickapic_test", "samples_sdxl_turbo_1step_pickapic_test"} <= set(names)
    (shown,) = figures.curves(load({"tables": ["table2"]}))
    assert len({row.method for row in shown.rows}) == len(shown.rows)


@pytest.mark.parametrize(
    ("label", "expected"),
    [("RPO w/ SDXL-DMD2", "RPO"), ("SDXL", "SDXL"), ("SPO (adapted) w/ SDXL-Turbo-4step", "SPO (adapted)")],
)
def test_labels_are_shortened(label, expected):
    assert short(label) == expected


# ---- grids ----


def test_evenly():
    names = [f"{i:03d}" for i in range(11)]
    assert evenly(names[::-1], 6) == ["000", "002", "004", "006", "008", "010"]
    assert evenly(names[:2], 6) == names[:2]


def test_samples_show_the_pixels(tmp_path):
    cfg = tree(tmp_path)
    labels = ["SDXL", *SHOWN]
    grid = grid_of(cfg, "many_steps_against_sdxl_dmd2_pickapic_test")
    path = save(samples(cfg, tmp_path, grid).figure, tmp_path / "samples.png")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    side = min(((1600 - LABEL) // len(labels) - GAP) // SIZE * SIZE, 256)
    assert pixels.shape == (HEAD + 6 * (side + GAP) + FOOT, LABEL + len(labels) * (side + GAP), 3)
    prompts = np.linspace(0, NUM_PROMPTS - 1, 6).round().astype(int)
    factor = side // SIZE
    for i, prompt in enumerate(prompts):
        for k, label in enumerate(labels):
            top, left = HEAD + i * (side + GAP), LABEL + k * (side + GAP)
            picture = pixels[top : top + side, left : left + side]
            small = picture[::factor, ::factor]
            assert (picture == small.repeat(factor, 0).repeat(factor, 1)).all()  # nearest neighbour
            assert (small[0] == (255, 0, 0)).all()  # not upside down
            assert (small[1:, len(label) % SIZE] == 255).all()  # the row's own column of pixels
            assert small[5, 1].tolist() == [5 * prompt] * 3  # the same prompt over the line


def texts(drawn) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in drawn.figure.texts]


def pictures(figure) -> list[np.ndarray]:
    return [artist.pixels for artist in figure.artists if isinstance(artist, Picture)]


def test_titles_tell_what_differs_and_the_foot_what_is_left_out(tmp_path):
    cfg = tree(tmp_path)
    found = texts(samples(cfg, tmp_path, grid_of(cfg)))
    assert found[6:9] == ["SDXL-DMD2", "Offline-PSO", "Online-PSO"]
    assert "Scale miniature, pickapic_test, image seed 0" in found[-1]
    assert "The rows of table1 with 4 steps; which rows the paper's own figures show is open" in found[-1]
    assert found[-1].endswith("1 rows of table1 have no images yet.")
    many = texts(samples(cfg, tmp_path, grid_of(cfg, "many_steps_against_sdxl_dmd2_pickapic_test")))
    assert many[6:8] == ["SDXL (50\N{NO-BREAK SPACE}steps)", "SDXL-DMD2 (4\N{NO-BREAK SPACE}steps)"]


def test_files_are_legible_and_the_same_twice(tmp_path):
    cfg = tree(tmp_path)
    written = write(cfg, tmp_path)
    expected = [f"{name}.{kind}" for name in figure_names(cfg) for kind in ("png", "pdf", "tex")]
    assert [path.name for path in written] == expected and len(written) == 3 * 7
    first = [path.read_bytes() for path in written]
    for data in first[::3]:
        assert 600 < Image.open(io.BytesIO(data)).width <= 1600
    assert all(data.startswith(b"%PDF") for data in first[1::3])
    assert [path.read_bytes() for path in write(cfg, tmp_path)] == first


def embedded(pdf: bytes) -> list[np.ndarray]:
    """Pictures of a PDF of matplotlib's: their streams are those of a PNG."""
    found = []
    head = rb"/Subtype /Image /Width (\d+) /Height (\d+)\s*/ColorSpace /DeviceRGB .*?/Length (\d+) 0 R >>\s*stream\r?\n"
    for match in re.finditer(head, pdf, re.S):
        width, height = int(match[1]), int(match[2])
        length = int(re.search(rb"\n%s 0 obj\s*(\d+)" % match[3], pdf)[1])
        parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)}
        parts |= {b"IDAT": pdf[match.end() : match.end() + length], b"IEND": b""}
        chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts.items()]
        found.append(np.asarray(Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)))))
    return found


def test_a_pdf_has_the_pictures_as_they_are(tmp_path):
    rng = np.random.default_rng(0)  # many colours: few would be embedded with a palette
    noise = [rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8) for _ in range(4)]
    figure = sheet(["a", "b"], [Line("x", [png(p) for p in noise[:2]]), Line("y", [png(p) for p in noise[2:]])], "foot")
    found = embedded(save(figure, tmp_path / "x.pdf").read_bytes())
    assert len(found) == 4
    for expected, pixels in zip(noise, found, strict=True):
        assert (pixels == expected.repeat(8, 0).repeat(8, 1)).all()


def test_a_snippet_escapes_what_latex_would_read():
    text = to_latex(Drawn("curves_a_b", None, "", "50 % of A_B < C | \N{EN DASH}\N{NO-BREAK SPACE}4"), "smoke")
    assert r"\caption{50 \% of A\_B \textless{} C \textbar{} --~4}" in text
    assert r"keepaspectratio]{curves_a_b}" in text and r"\label{fig:curves_a_b}" in text


def test_a_line_may_have_no_picture_at_a_place():
    picture = png(np.full((8, 8, 3), 10, np.uint8))
    figure = sheet(["a", "b"], [Line("x", [b"", picture])], "foot")
    assert len(pictures(figure)) == 1


def test_large_pictures_are_averaged_down():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 200
    assert enlarged(png(stripes), 128).shape == (128, 128, 3)
    assert abs(enlarged(png(stripes), 128).astype(int) - 100).max() <= 1


def test_pictures_that_are_no_squares_show_their_middle():
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 250
    assert (enlarged(png(wide), 64) == 250).all() and enlarged(png(wide), 64).shape == (64, 64, 3)


def test_missing_images_name_the_command(tmp_path):
    with pytest.raises(
        UserError, match="holds no shard.*of 'SDXL-DMD2'; make them with `python -m eval.generate --model sdxl_dmd2"
    ):
        samples(built(), tmp_path, grid_of(built()))


def test_a_row_with_fewer_images_is_refused(tmp_path):
    cfg = tree(tmp_path)
    (paths.images_dir(run_of(cfg, tmp_path, "pso_online"), "pickapic_test", 4) / "shard0.parquet").unlink()
    with pytest.raises(UserError, match="images with seed 0 for 6 prompts of 'Online-PSO .*missing: p"):
        samples(cfg, tmp_path, grid_of(cfg))


# ---- subjects ----

SUBJECTS = ["cup", "kite"]


def concept(results):
    """A table with subjects, its images, and a DreamBooth folder of real pictures of one grey level each."""
    rows = [ROWS[2], ROWS[3]]
    entry = table(task="concept", subjects=SUBJECTS, eval_sets=["dreambooth_prompts"], rows=rows, extra_rows=[])
    dataset = DatasetEntry(format="dreambooth", repo="google/dreambooth", files="dataset", num_seeds=2)
    cfg = built(table_entries={"table1": entry}, datasets={"dreambooth_prompts": dataset})
    folder = hub_dir(cfg.scale, results) / "google/dreambooth/dataset"
    lists = "".join(
        f"{title}\n\nprompt_list = [\n'a {{0}} {{1}}'.format(unique_token, class_token),\n]\n\n"
        for title in ("Object Prompts", "Live Subject Prompts")
    )
    folder.mkdir(parents=True)
    (folder / PROMPT_FILE).write_text(f"subject_name,class\ncup,cup\nkite,kite\n\nPrompts\n\n{lists}")
    for level, subject in enumerate(SUBJECTS, 1):
        (folder / subject).mkdir()
        for k in range(3 - level):  # two pictures of the cup, one of the kite
            picture = np.full((SIZE, SIZE, 3), 100 * level + k, np.uint8)
            (folder / subject / f"{k}.png").write_bytes(png(picture))
        for row in rows:
            write_images(cfg, results, row, "dreambooth_prompts", SIZE, task=f"concept/{subject}")
    return cfg


def test_real_pictures_stand_beside_each_rows_samples(tmp_path):
    cfg = concept(tmp_path)
    (grid,) = figures.grids(cfg)
    assert grid.name == "samples_concept_dreambooth_prompts"
    figure = of_subjects(cfg, tmp_path, grid)
    found = texts(figure)
    assert found[0].startswith("cup: a long prompt") and found[1].startswith("kite: a long prompt")
    assert found[2:6] == ["Real picture", "Another one", "SDXL-DMD2", "Offline-PSO"]
    levels = [int(pixels[40, 40, 0]) for pixels in pictures(figure.figure)]
    assert len(levels) == 7, "the kite has one picture"
    assert levels[:2] == [100, 101] and levels[4] == 200
    assert levels[2] == levels[3] != levels[5] == levels[6], "one prompt in a line, another in the next"


# ---- curves ----


def test_probes(tmp_path):
    path = tmp_path / "train.jsonl"
    lines = [
        probe(10, reward=0.3),
        json.dumps({"event": "update", "update": 10, "loss": 1.0}),
        probe(0, metrics={"sharpness": 7.0}),
        probe(10, reward=0.4),
    ]
    path.write_text("\n".join(lines))
    found = read_probes(path)
    assert found["update"].to_list() == [0, 10]
    assert found["kl"].to_list() == [0.0, 7.5]
    assert np.isnan(found["reward"].iloc[0]) and found["reward"].iloc[1] == 0.4  # the later entry of update 10
    assert found["sharpness"].iloc[0] == 7.0 and np.isnan(found["sharpness"].iloc[1])
    path.write_text(probe(0) + '\n{"event": "pro')
    with pytest.raises(UserError, match="line 2 is no JSON object"):
        read_probes(path)
    path.write_text("[]\n")
    with pytest.raises(UserError, match="line 1 is no JSON object"):
        read_probes(path)


def test_a_sampler_without_kernel_has_no_kl_and_not_a_kl_of_0(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"event": "probe", "update": 0, "kl": {}, "reward": 1.0}))
    found = read_probes(path)
    assert found["kl"].isna().all() and found["reward"].to_list() == [1.0]


def test_a_model_whose_sampler_has_no_kernel_has_no_panels_of_kl(tmp_path):
    cfg = tree(tmp_path)
    for method in MODULES:
        entry = {"event": "probe", "update": 3, "kl": {}, "reward": 1.0, "metrics": {"sharpness": 2.0}}
        (run_of(cfg, tmp_path, method) / "train.jsonl").write_text(json.dumps(entry))
    (shown,) = figures.curves(cfg)
    figure = curves(cfg, shown, runs(cfg, tmp_path, shown)).figure
    assert [panel.get_ylabel() for panel in figure.axes] == ["Reward", "Sharpness"]
    assert "No KL (deterministic sampler): Naive fine-tune, Offline-PSO, Online-PSO." in figure.get_suptitle()


def test_the_untuned_level_is_named_where_the_first_panel_has_none(tmp_path):
    cfg = tree(tmp_path)
    for method in MODULES:
        (run_of(cfg, tmp_path, method) / "train.jsonl").write_text(probe(0, metrics={"sharpness": 9.0}))
    (shown,) = figures.curves(cfg)
    figure = curves(cfg, shown, runs(cfg, tmp_path, shown)).figure
    assert figure.axes[0].get_title(loc="left") == "Distance from the untuned model"
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "untuned"


def test_a_figure_of_runs_without_probes_has_no_numbers_on_its_axes(tmp_path):
    cfg = tree(tmp_path)
    for method in MODULES:
        (run_of(cfg, tmp_path, method) / "train.jsonl").unlink()
    (shown,) = figures.curves(cfg)
    drawn = curves(cfg, shown, runs(cfg, tmp_path, shown))
    (panel,) = drawn.figure.axes
    assert panel.texts[0].get_text() == "nothing was measured" and list(panel.get_xticks()) == []
    assert "No probes: Naive fine-tune, Offline-PSO, Online-PSO." in drawn.caption


def test_every_method_is_probed_for_blur():
    """So that every tuned model's curves show it."""
    methods = load({}).methods
    assert {name for name, entry in methods.items() if "sharpness" not in entry.tune.probe_metrics} == set()


def test_a_log_without_probes_is_empty(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"event": "update", "update": 1, "loss": 1.0}))
    assert read_probes(path).empty and list(read_probes(path).columns) == ["update", "reward", "kl"]


def test_curves_show_every_run_and_say_what_is_not_there(tmp_path):
    cfg = tree(tmp_path)
    (run_of(cfg, tmp_path, "pso_offline") / "train.jsonl").unlink()
    (shown,) = figures.curves(cfg)
    figure = curves(cfg, shown, runs(cfg, tmp_path, shown)).figure
    reward, kl, both, sharpness = figure.axes
    labels = ["Naive fine-tune", "Offline-PSO", "Online-PSO"]
    assert [line.get_label() for line in kl.get_lines()] == labels
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*labels, "untuned"]
    assert kl.get_lines()[0].get_ydata().tolist() == [0.0, 7.5] and kl.get_yscale() == "symlog"
    assert both.get_lines()[2].get_xdata().tolist() == [0.0, 7.5]
    assert reward.get_title(loc="left") == "Reward (PickScore)"
    assert reward.get_lines()[2].get_ydata().tolist() == [20.0, 20.0], "in the unit of the tables"
    assert sharpness.get_title(loc="left").startswith("Sharpness")
    *lines, untuned = sharpness.get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[90.0, 90.0], [], []]
    assert list(untuned.get_ydata()) == [90.0, 90.0] and untuned.get_label() == "untuned"
    for line, row in zip(lines, shown.rows, strict=True):
        style = method_style(cfg, row.method)
        assert (line.get_color(), line.get_marker()) == (style["color"], style["marker"])
    told = figure.get_suptitle().replace("\n", " ")
    assert "No probes: Offline-PSO." in told and "No reward measured: Naive fine-tune." in told
    assert "No sharpness measured: Online-PSO." in told


def test_a_probe_that_is_not_finite_is_told_and_not_drawn(tmp_path):
    cfg = tree(tmp_path)
    log = run_of(cfg, tmp_path, "pso_online") / "train.jsonl"
    log.write_text(
        f"{log.read_text().rstrip()}\n" + json.dumps({"event": "probe", "update": 99, "kl": {"2": math.inf}})
    )
    (shown,) = figures.curves(cfg)
    figure = curves(cfg, shown, runs(cfg, tmp_path, shown)).figure
    assert "Not finite in some probes: Online-PSO." in figure.get_suptitle().replace("\n", " ")
    _, kl, *_ = figure.axes
    assert kl.get_lines()[2].get_xdata().tolist() == [0.0, 10.0] and kl.get_yscale() == "symlog"


def test_runs_of_several_seeds_share_their_rows_style(tmp_path):
    cfg = tree(tmp_path, built(seeds=[0, 1]))
    folder = paths.run_dir(cfg.scale, "preference", "sdxl_dmd2", "pso_online", 1, tmp_path)
    (folder / "train.jsonl").write_text(probe(0, reward=0.1) + "\n" + probe(20, reward=0.3))
    (shown,) = figures.curves(cfg)
    figure = curves(cfg, shown, runs(cfg, tmp_path, shown)).figure
    lines = figure.axes[0].get_lines()[4:]
    assert [list(line.get_ydata()) for line in lines[:2]] == [[20.0, 20.0], [10.0, 30.0]]
    assert lines[0].get_color() == lines[1].get_color() and len(figure.legends[0].get_texts()) == 3 + 1
    assert [line.get_ydata()[0] for line in lines[2:]] == [20.0, 10.0], "two untuned levels"
    assert "No probes: Naive fine-tune, seed 1, Offline-PSO, seed 1." in figure.get_suptitle().replace("\n", " ")


def test_a_frame_of_probes_is_all_numbers(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(probe(0) + "\n" + probe(5, reward=1))
    assert all(pd.api.types.is_float_dtype(kind) for kind in read_probes(path).dtypes)
