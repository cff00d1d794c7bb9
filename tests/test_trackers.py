"""TensorBoard and W&B: what they hold is what train.jsonl tells, and a run is the same with and without them."""

import itertools
import json
import re
import shutil
import socket
import struct
import sys
import tempfile
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import toy
import tracker_worker
from accelerate import Accelerator
from conftest import ROOT, run
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from toy import quiet  # noqa: F401
from tracker_worker import HOST, METHOD, PROMPTS, UPDATES, folder, new_probe

from pso import trackers
from pso.checks import ConfigError
from pso.config import job_environment, load
from pso.params import kept_params, run_params
from pso.paths import LORA_FILE
from pso.provenance import digest, fingerprint
from pso.trackers import CAPTION, GAP, LINES, TensorBoard, Trackers, asked, flat, grid, hyperparameters

BOTH = ["tensorboard", "wandb"]
MINE = {"USER": "me-of-mine", "LOGNAME": "me-of-mine", "WANDB_API_KEY": "5ec3e7" * 8}
JOBS = [
    {"results": "off", "log_with": []},
    {"results": "cut", "log_with": BOTH, "at": {"5": ["killed"]}},
    {"results": "back", "log_with": BOTH, "at": {"4": ["asked_to_stop"]}},
    {"results": "cut", "log_with": BOTH},
    {"results": "back", "log_with": []},
    {"results": "bad", "log_with": BOTH, "at": {"2": ["disk_full", "service_gone"]}},
    {"results": "late", "log_with": ["wandb"], "at": {"4": ["asked_to_stop"], "end": ["service_dies_meanwhile"]}},
    {"results": "late", "log_with": ["wandb"], "at": {"end": ["service_dies_meanwhile"]}},
    {
        "results": "alone",
        "log_with": ["wandb"],
        "environment": {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"},
    },
    {"results": "no key", "log_with": ["wandb"], "environment": {"WANDB_MODE": "online", "WANDB_API_KEY": ""}},
    {"results": "bad key", "log_with": ["wandb"], "environment": {"WANDB_MODE": "online", "WANDB_API_KEY": "short"}},
]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder in which the worker has done the jobs."""
    home = tmp_path_factory.mktemp("cwd-of-mine")
    jobs = [job | {"results": str(home / job["results"])} for job in JOBS]
    told = {"HOME": str(home / "home"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "WANDB_MODE": "offline", **MINE}
    with tempfile.TemporaryDirectory() as temporary:  # W&B leaves folders there; its socket needs a short path
        done = run("python", tracker_worker.__file__, json.dumps(jobs), cwd=home, TMPDIR=temporary, **told)
    assert done.returncode == 0, done.stderr[-3000:]
    return home


def said(done: Path, name: str) -> str:
    return (folder(done / name) / "tune.log").read_text()


def statuses(done: Path, name: str) -> list[int]:
    """Exit codes of a run's sessions."""
    return [int(line) for line in (done / name / "status").read_text().splitlines()]


def journal(done: Path) -> list[dict]:
    return [json.loads(line) for line in (folder(done / "off") / "train.jsonl").read_text().splitlines()]


def expected(done: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, from train.jsonl, written down once more."""
    found: dict[str, dict[int, float]] = {}
    for line in journal(done):
        step, kind = line.pop("update"), {"update": "train", "probe": "probe"}[line.pop("event")]
        if kind == "probe":
            line["kl/sum"] = sum(line["kl"].values())
        else:
            line["learning_rate"] = tracker_worker.TUNE["learning_rate"]
        for name, value in line.items():
            inner = {f"/{k}": v for k, v in value.items()} if isinstance(value, dict) else {"": value}
            for key, number in inner.items():
                found.setdefault(f"{kind}/{name}{key}", {})[step] = number
    return found


# ---- the run is the same ----


def test_off_loads_neither_package_and_leaves_nothing(done):
    assert json.loads((done / "off/modules").read_text()) == []
    assert json.loads((done / "cut/modules").read_text()) == BOTH
    kept = {path.name for path in folder(done / "off").iterdir()}
    assert kept == {
        ".state.done", "lora", "run.json", "config.yaml", "train.jsonl", "timeline.jsonl", "tune.log",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["cut", "back", "bad", "late", "alone"])
def test_log_and_lora_are_those_of_a_run_without(done, name):
    assert statuses(done, name)[-1] == 0, (done / name / "out").read_text()[-3000:]
    for file in ("train.jsonl", f"lora/{LORA_FILE}", "config.yaml"):
        ours, theirs = (folder(done / n) / file for n in (name, "off"))
        assert ours.read_bytes() == theirs.read_bytes(), file
    ours, theirs = (json.loads((folder(done / n) / "run.json").read_text()) for n in (name, "off"))
    for told in (ours, theirs):
        del told["resumed_at"], told["cost"]
    assert ours == theirs


def test_a_run_goes_on_with_other_trackers(done):
    """`back` was stopped with both, and went on with none."""
    assert "SIGTERM: stopped after update 4 of 6" in said(done, "back")
    assert json.loads((done / "back/modules").read_text()) == []
    assert "continuing after update 4" in said(done, "back")


def test_no_param_of_a_job_knows_of_it():
    on, off = (load({"scale": "smoke", "log_with": value}) for value in (BOTH, []))
    assert on.log_with == BOTH and load({}).log_with == []
    assert run_params(on, "sdxl_dmd2", METHOD) == run_params(off, "sdxl_dmd2", METHOD)
    assert kept_params(on, "sdxl_dmd2", METHOD) == kept_params(off, "sdxl_dmd2", METHOD)
    assert fingerprint("pso.trackers") == fingerprint()  # its code changes no number
    settings = json.loads(job_environment({"log_with": BOTH})["PSO_BENCH_SETTINGS"])
    assert load(settings).log_with == BOTH  # how jobs of a workflow hear of it


# ---- TensorBoard ----


@pytest.fixture(scope="module")
def events(done):
    found = EventAccumulator(str(folder(done / "cut") / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def test_tensorboard_holds_every_number_once_though_two_updates_were_made_twice(done, events):
    numbers = expected(done)
    assert set(events.Tags()["scalars"]) == set(numbers) and len(numbers) == 14
    for tag, values in numbers.items():
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(step, np.float32(value)) for step, value in sorted(values.items())], tag
    files = sorted((folder(done / "cut") / "tensorboard").iterdir())
    alone = [EventAccumulator(str(file)).Reload().Scalars("train/loss") for file in files]
    assert [[event.step for event in one] for one in alone] == [[1, 2, 3, 4, 5], [4, 5, 6]]


def sampled(done: Path, update: int) -> list[Image.Image]:
    """The probe's pictures, drawn anew by the LoRA of an update."""
    policy = toy.new_policy()
    if update == UPDATES:
        state = load_file(folder(done / "off") / "lora" / LORA_FILE)
        policy.set_lora_state({key.removeprefix("unet."): value for key, value in state.items()})
    elif update:
        policy.set_lora_state(load_file(folder(done / "off") / ".state.done/update0000003/lora.safetensors"))
    probe = new_probe(policy)
    probe.keeps_pictures = True
    probe()
    return probe.pictures


def tiles(whole: np.ndarray, side: int, count: int, columns: int) -> list[np.ndarray]:
    """The pictures of a grid without their captions."""
    high = side + LINES * (CAPTION + 3)
    places = [(i // columns * high, i % columns * (side + GAP)) for i in range(count)]
    return [whole[top : top + side, left : left + side] for top, left in places]


@pytest.fixture(scope="module")
def pictures(done) -> dict[int, list[Image.Image]]:
    return {update: sampled(done, update) for update in (0, 3, 6)}


def shows(whole: np.ndarray, pictures: list[Image.Image]) -> bool:
    enlarged = [np.asarray(picture).repeat(8, 0).repeat(8, 1) for picture in pictures]
    return all(np.array_equal(a, b) for a, b in zip(tiles(whole, 128, 2, 2), enlarged, strict=True))


def decoded(png: bytes, tmp_path: Path) -> np.ndarray:
    (tmp_path / "grid.png").write_bytes(png)
    return np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))


def test_tensorboard_shows_each_probes_pictures_the_first_from_before_training(events, pictures, tmp_path):
    images = events.Images("probe/samples")
    assert [image.step for image in images] == [0, 3, 6]
    grids = {image.step: decoded(image.encoded_image_string, tmp_path) for image in images}
    for update, whole in grids.items():
        assert [shows(whole, pictures[other]) for other in pictures] == [other == update for other in pictures]
    (text, *_) = events.Tensors("probe/prompts/text_summary")
    assert text.tensor_proto.string_val[0].decode() == f"1. {PROMPTS[0]}\n2. {PROMPTS[1]}"


def test_tensorboard_compares_runs_by_their_settings(done, events):
    content = events.PluginTagToContent("hparams")
    found = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    beside = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment.metric_infos
    assert {info.name.tag for info in beside} == {"probe/reward", "probe/kl/sum"} < set(events.Tags()["scalars"])
    told = hyperparameters(json.loads((folder(done / "off") / "run.json").read_text())["config"])
    assert set(found) == {key for key, value in told.items() if value is not None}
    assert found["method.tune.learning_rate"].number_value == 1.0e-3 and found["seed"].number_value == 0
    assert found["method.name"].string_value == METHOD and found["model.lora_targets"].string_value.startswith(
        '["to_q"'
    )


# ---- W&B ----


def records(path: Path) -> list:
    """Of a .wandb file, which is a LevelDB log: blocks of 32 KiB, a record is whole (1) or its last part has kind 4."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts, found = path.read_bytes(), 7, [], []
    while at < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(b"".join(parts)))
            parts = []
    return found


def sessions(done: Path, name: str) -> list[list]:
    """Records of each, in the order of their names, which are times."""
    found = sorted((folder(done / name) / "wandb").glob("offline-run-*/run-*.wandb"))
    return [records(path) for path in found]


def history(session: list) -> list[dict]:
    lines = [record.history for record in session if record.WhichOneof("record_type") == "history"]
    return [{".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in line.item} for line in lines]


def test_wandb_holds_every_number_once_and_goes_on_as_the_same_run(done):
    first, second = sessions(done, "cut")
    steps = [[line["_step"] for line in history(session)] for session in (first, second)]
    assert steps == [[0, 1, 2, 3, 4], [5, 6]]  # 4 was made again; W&B closes 5 when it hears of 6
    found: dict[str, dict[int, float]] = {}
    for line in itertools.chain(history(first), history(second)):
        for key, value in line.items():
            if isinstance(value, int | float):
                found.setdefault(key, {})[line["_step"]] = value
    for own in ("_step", "_runtime", "_timestamp"):
        del found[own]
    numbers = expected(done)
    assert set(found) == set(numbers) | {f"probe/samples.{key}" for key in ("width", "height", "count")}
    for tag, values in numbers.items():
        assert found[tag] == pytest.approx(values, rel=1e-12), tag
    begun = [r.run for session in (first, second) for r in session if r.WhichOneof("record_type") == "run"]
    assert begun[0].run_id == begun[1].run_id
    assert {(r.project, r.display_name) for r in begun} == {("pso-bench", f"smoke/preference/sdxl_dmd2/{METHOD}/seed0")}


def test_wandb_shows_the_same_pictures_and_settings(done, pictures, tmp_path):
    first, second = sessions(done, "cut")
    media = folder(done / "cut") / "wandb"
    found = {
        int(path.name.split("_")[1]): decoded(path.read_bytes(), tmp_path) for path in media.rglob("samples_*.png")
    }
    assert sorted(found) == [0, 3, 6]
    assert all(shows(whole, pictures[update]) for update, whole in found.items())
    config = {
        u.key: json.loads(u.value_json)
        for r in second if r.WhichOneof("record_type") == "config" for u in r.config.update
    }  # fmt: skip
    told = hyperparameters(json.loads((folder(done / "off") / "run.json").read_text())["config"])
    assert config == pytest.approx(told)


@pytest.mark.parametrize("name", ["cut", "back", "bad"])
def test_nothing_of_the_machine_is_written(done, name):
    """Nor the key. W&B's file by its records, which its blocks cut; the real host only where it stands as a word."""
    secrets = [HOST, *MINE.values(), str(done), done.name, str(ROOT), str(Path.home())]
    words = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, [socket.gethostname(), *secrets]))})(?![\w-])")
    base = folder(done / name)
    seen = 0
    for top in BOTH:
        for path in (base / top).rglob("*"):
            seen += path.is_file()
            assert not words.search(str(path.relative_to(base))), path
            assert not path.is_symlink() or name == "bad", path  # /dev/full, put there by the test
            if path.is_file() and not path.is_symlink() and path.suffix != ".png":
                content = path.read_bytes()
                assert not [secret for secret in secrets if secret.encode() in content], path
                text = "".join(map(str, records(path))) if path.suffix == ".wandb" else content.decode("latin-1")
                assert not (hit := words.search(text)), (path, hit)
    assert seen >= 2 and {path.name for path in done.iterdir()} == {job["results"] for job in JOBS} | {"home"}
    told = (base / "run.json").read_text() + (base / "config.yaml").read_text()
    assert not words.search(told)


# ---- what fails ----


def test_a_full_disk_and_a_lost_service_are_told_once_and_counted(done):
    text = said(done, "bad")
    for name, why in (("tensorboard", "No space left on device"), ("wandb", "")):
        (line,) = re.findall(rf"^{name} failed \((.*)\): nothing more is logged there, training goes on$", text, re.M)
        assert why in line
        lacking = 2 * 2 + 4  # two probes with numbers and pictures, four updates
        assert f"{name} lacks {lacking} entries of this session; train.jsonl has them all" in text
    assert "update 6/6" in text


def test_a_service_that_dies_while_the_run_ends_is_told_and_changes_no_exit_code(done):
    """Snakemake removes the outputs of a run that exits with another than 0, and 75 says that it goes on."""
    assert statuses(done, "late") == [75, 0]
    said_once = r"^wandb failed \((.*)\): its last entries may not be there; train.jsonl has them all$"
    ends = re.findall(said_once, said(done, "late"), re.M)
    assert ends == ["HandleAbandonedError"] * 2  # W&B's own, which is no wandb.Error
    assert "lacks" not in said(done, "late")


def test_a_server_that_cannot_be_reached_is_told_once_and_counted_and_the_run_goes_on_without(done):
    text = said(done, "alone")
    (line,) = re.findall(r"^log_with names wandb, but (.*); this run goes on without it$", text, re.M)
    assert "context deadline exceeded" in line and "starting, which waits for its server at most 1 s" in text
    assert "wandb lacks 9 entries of this session; train.jsonl has them all" in text  # 3 probes, 6 updates
    assert list((folder(done / "alone") / "wandb").iterdir()) == []  # nothing that a later session would take as told


def session(tmp_path: Path, start: int = 0, reached: int = 0) -> tuple[Trackers, TensorBoard]:
    tracker = TensorBoard(tmp_path, "name")
    accelerator, probe = Accelerator(cpu=True, log_with=[tracker]), new_probe(toy.new_policy())
    return Trackers(accelerator, tmp_path, {"scale": "smoke"}, {}, start, reached, probe), tracker


def test_an_error_of_the_program_is_not_swallowed(tmp_path):
    found, tracker = session(tmp_path)
    tracker.log = lambda *_: {}["nothing"]
    with pytest.raises(KeyError):
        found.update(1, {"loss": 1.0}, 1e-3)


def test_an_error_that_a_package_defines_is_told_whatever_its_base(tmp_path, caplog):
    def log(*_):
        raise type("NewError", (Exception,), {"__module__": "wandb.sdk.of_another_version"})

    found, tracker = session(tmp_path)
    tracker.log = log
    found.update(1, {"loss": 1.0}, 1e-3)
    assert "tensorboard failed (NewError): nothing more is logged there" in caplog.messages[-1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_at_the_end_is_told(tmp_path, caplog):
    before = set(threading.enumerate())
    found, _ = session(tmp_path)
    writers = set(threading.enumerate()) - before
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    found.update(1, {"loss": 1.0}, 1e-3)
    found.end()
    assert [m for m in caplog.messages if "tensorboard" in m][-1].startswith("tensorboard lacks 1 entries")
    for writer in writers:  # TensorBoard's, whose error is printed here and not in the middle of another test
        writer.join(10)
        assert not writer.is_alive()


def test_a_run_that_starts_anew_starts_its_curves_anew_and_one_that_goes_on_keeps_them(tmp_path):
    for start, steps in ((0, [1, 2]), (1, [1, 2]), (0, [1])):
        found, _ = session(tmp_path, start, 2)
        for update in steps[start:]:
            found.update(update, {"loss": float(update)}, 1e-3)
        found.end()
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
        assert [event.step for event in events] == steps
    found, _ = session(tmp_path / "off", 0)
    assert (tmp_path / "off/tensorboard").exists()
    Trackers(Accelerator(cpu=True), tmp_path / "off", {}, {}, 0, 0, new_probe(toy.new_policy()))
    assert not (tmp_path / "off/tensorboard").exists()  # curves of a run that is no more


@pytest.mark.parametrize("start", [0, 3])
def test_what_cannot_start_is_a_warning_and_counted(tmp_path, caplog, start):
    (tmp_path / "tensorboard").write_text("in the way")
    found, _ = session(tmp_path, start)
    (line,) = [message for message in caplog.messages if "tensorboard" in message]
    assert re.fullmatch("log_with names tensorboard, but .*File exists.*; this run goes on without it", line)
    found.update(start + 1, {"loss": 1.0}, 1e-3)
    found.end()
    assert "tensorboard lacks 1 entries" in caplog.messages[-1]


def test_a_probe_without_scorers_says_that_it_shows_nothing(tmp_path, caplog):
    tracker, probe = TensorBoard(tmp_path, "name"), new_probe(toy.new_policy())
    probe.reward, probe.metrics = None, {}
    found = Trackers(Accelerator(cpu=True, log_with=[tracker]), tmp_path, {}, {}, 0, 0, probe)
    assert "so it makes no pictures to show" in caplog.messages[-1]
    found.probe(0, probe(), probe)
    found.end()
    assert EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["images"] == []


# ---- before anything is loaded ----


def test_a_package_that_is_not_installed_is_a_sentence(monkeypatch, tmp_path):
    known = {"tensorboard": ModuleSpec("tensorboard", None, origin="there")}
    monkeypatch.setattr(trackers.importlib.util, "find_spec", known.get)
    with pytest.raises(ConfigError) as caught:
        asked(["wandb"], tmp_path, "name")
    assert str(caught.value) == (
        "config.log_with is ['wandb'], but wandb is not installed; expected it installed by "
        "`pip install -e '.[logging]'`, or log_with without it."
    )
    assert [t.name for t in asked(["tensorboard", "tensorboard"], tmp_path, "name")] == ["tensorboard"]
    assert asked([], tmp_path, "name") is None


def test_a_folder_that_wandb_left_is_not_the_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        asked(["wandb"], tmp_path, "name")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "no key",
            "W&B has no key; expected `wandb login` before, or WANDB_MODE=offline, which keeps everything in the run's",
        ),
        ("bad key", "W&B does not start: WANDB_API_KEY invalid: API key must have 40+ characters, has 5"),
    ],
)
def test_wandb_without_a_key_asks_nobody(done, name, sentence):
    assert statuses(done, name) == [1]
    assert f"tune: config.log_with is ['wandb'], but {sentence}" in (done / name / "out").read_text()
    assert not folder(done / name).exists()


# ---- what is told ----


def test_nested_values_become_tags():
    assert flat({"train": {"loss": 1.0, "kl": {"4": 2.0, 3: 0.5}}}) == {
        "train/loss": 1.0,
        "train/kl/4": 2.0,
        "train/kl/3": 0.5,
    }


def test_settings_of_two_methods_have_the_same_names():
    one, other = (
        hyperparameters(
            {"model": {"m": {"grids": {4: [999, 249]}}}, "method": {name: {"tune": {"beta": 5.0}}}, "seed": 0}
        )
        for name in ("a", "b")
    )
    assert one == {
        "model.name": "m", "model.grids.4": "[999, 249]", "method.name": "a", "method.tune.beta": 5.0, "seed": 0,
    }  # fmt: skip
    assert other == one | {"method.name": "b"}


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (5, 3), (16, 4)])
def test_a_grid_holds_every_picture_above_its_prompt(count, columns):
    drawn = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)) for i in range(count)]
    whole = grid(drawn, [f"prompt {i}" for i in range(count)])
    for picture, tile in zip(drawn, tiles(whole, 128, count, columns), strict=True):
        assert np.array_equal(tile, np.asarray(picture).repeat(4, 0).repeat(4, 1))
    below = whole[128 : 128 + LINES * (CAPTION + 3), :128]
    assert (below < 128).any() and (below == 255).any()
    other = grid(drawn, ["another", *(f"prompt {i}" for i in range(1, count))])
    assert not np.array_equal(below, other[128 : 128 + LINES * (CAPTION + 3), :128])


def test_large_pictures_are_averaged():
    fine = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3)).astype(np.uint8)
    (tile,) = tiles(grid([Image.fromarray(fine)], ["x"]), 256, 1, 1)
    means = fine.reshape(256, 4, 256, 4, 3).mean((1, 3))
    assert np.abs(tile - means).max() <= 1


def test_a_caption_fits_below_its_picture():
    """However long or wide a prompt is: its letters end where the next picture begins."""
    grey = [Image.new("RGB", (64, 64), "grey")] * 2
    whole = grid(grey, ["W" * 400, ""])
    assert (whole[128:, 128 + GAP : 160] < 128).any()  # the other's number
    blank = grid(grey, ["", ""])
    assert whole.shape == blank.shape and np.array_equal(whole[:, 128:], blank[:, 128:])


def test_a_run_made_anew_drops_its_own_curves_and_keeps_sessions_of_others(tmp_path):
    """Those of other settings may not have been sent to W&B yet; with the same ones every number is made again."""
    made_from = {"settings": {"seed": 0}, "code": "a"}
    own, other = (tmp_path / "wandb" / f"offline-run-20260101_000000-{digest(made)}" for made in (made_from, {}))
    for path in (tmp_path / "tensorboard", own, other):
        path.mkdir(parents=True)
    nobody = SimpleNamespace(log_with=[])
    Trackers(nobody, tmp_path, {}, made_from, start=4, reached=4, probe=None)
    assert own.exists() and (tmp_path / "tensorboard").exists()
    Trackers(nobody, tmp_path, {}, made_from, start=0, reached=0, probe=None)
    assert other.exists() and not own.exists() and not (tmp_path / "tensorboard").exists()
