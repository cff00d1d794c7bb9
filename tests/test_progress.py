"""How far a campaign is, from files that others are writing."""

import json
import shutil
from dataclasses import asdict

import pytest
from conftest import run, snakemake
from hypothesis import given
from hypothesis import strategies as st

from pso import estimate, progress
from pso.campaign import Run
from pso.config import load
from pso.paths import manifest, model_dir, run_dir
from pso.resources import Needs
from pso.runs import jobs, metrics

ONLINE = Run("preference", "sdxl_dmd2", "pso_online", 0)
NOW = 1_800_000_000.0
HOUR = 3600.0
RECORD = json.dumps({"cost": {"wall_s": 1800.0}, "hardware": {"cpus": 2}})


@pytest.fixture(scope="module")
def needs():
    return Needs(load({"scale": "smoke", "tables": ["table1"]}))


def folder_of(needs, results, of=ONLINE):
    folder = run_dir(needs.config.scale, of.task, of.model, of.method, of.seed, results)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def began(at, update=0, gpus=0, processes=1, started=None, planned=6):
    more = {"planned": planned, "processes": processes, "gpus": gpus, "started": at if started is None else started}
    return {"event": "began", "time": at, "update": update, **more}


def event(name, at, update, **more):
    return {"event": name, "time": at, "update": update, **more}


def told(needs, results, *lines, of=ONLINE, now=NOW):
    write(folder_of(needs, results, of) / "timeline.jsonl", *lines)
    return progress.told(needs, of, results, now)


# ---- one run ----


def test_a_run_without_files_waits(needs, tmp_path):
    found = progress.told(needs, ONLINE, tmp_path, NOW)
    assert (found["state"], found["updates"], found["planned"]) == ("waiting", 0, 6)
    assert found["hours"] == found["retries"] == 0 and found["seconds_per_update"] is found["loss"] is None


def test_a_run_that_goes_on_is_counted_to_now(needs, tmp_path):
    folder = folder_of(needs, tmp_path)
    write(
        folder / "train.jsonl",
        {"event": "probe", "update": 0, "reward": 19.0},
        *({"event": "update", "update": n, "loss": 0.7 - n / 100, "margin": n, "implicit_accuracy": 0.5 + n / 10,
           "kl_batch": {"3": 0.1}} for n in (1, 2, 3)),
        {"event": "probe", "update": 3, "reward": 21.5},
        {"event": "update", "update": 4, "loss": 0.5, "margin": 4.5, "implicit_accuracy": 0.75},
    )  # fmt: skip
    lines = [began(NOW - 100, gpus=4, started=NOW - 160), event("at", NOW - 40, 3)]
    found = told(needs, tmp_path, *lines)
    assert (found["state"], found["updates"], found["planned"]) == ("running", 4, 6)  # train.jsonl is more exact
    assert found["seconds_per_update"] == 20 and found["retries"] == 0
    assert [found[k] for k in ("loss", "margin", "implicit_accuracy", "reward")] == [0.5, 4.5, 0.75, 21.5]
    assert found["hours"] == pytest.approx(4 * 160 / HOUR) and found["unit"] == "GPU-hours"
    assert progress.with_time_left([found]) > 0 and found["left_s"] == 40


def test_hours_and_starts_of_all_sessions_are_added(needs, tmp_path):
    lines = [
        began(1000, gpus=2, started=900), event("at", 1300, 3),  # killed
        began(5000, update=2, gpus=2, started=4950), event("stopped", 5100, 4, why="SIGTERM"),
        began(9000, update=4, gpus=1, started=9000), event("ended", 9060, 6),
    ]  # fmt: skip
    (folder_of(needs, tmp_path) / "run.json").write_text(RECORD)
    found = told(needs, tmp_path, *lines)
    assert (found["state"], found["updates"], found["retries"]) == ("done", 6, 2)
    assert found["hours"] == pytest.approx((2 * 400 + 2 * 150 + 60) / HOUR)
    assert found["seconds_per_update"] == 30  # of the last session
    progress.with_time_left([found])
    assert found["left_s"] == 0


def test_without_gpus_hours_are_those_of_processes(needs, tmp_path):
    found = told(needs, tmp_path, began(NOW - 900, processes=2), event("at", NOW - 450, 3))
    assert (found["hours"], found["unit"]) == (0.5, "CPU-hours")


def test_a_run_that_lost_updates_to_a_kill_is_where_it_goes_on(needs, tmp_path):
    write(folder_of(needs, tmp_path) / "train.jsonl", {"event": "update", "update": 3, "loss": 0.5})
    lines = [began(1000), event("at", 1300, 5), began(NOW - 5, update=3)]
    found = told(needs, tmp_path, *lines)
    assert (found["state"], found["updates"], found["seconds_per_update"]) == ("running", 3, 60)


@pytest.mark.parametrize(
    ("lines", "whole", "state"),
    [
        ([began(NOW - 599)], False, "running"),
        ([began(NOW - 601)], False, "silent"),
        ([began(NOW - 4000), event("at", NOW - 1000, 3)], False, "running"),  # 1000 s each: no sign of trouble yet
        ([began(NOW - 9000), event("at", NOW - 5900, 3)], False, "silent"),
        ([began(NOW - 90), event("stopped", NOW - 80, 2, why="SIGUSR1")], False, "stopped"),
        ([began(NOW - 90), event("stopped", NOW - 80, 2, why="SIGUSR1"), began(NOW - 9, 2)], False, "running"),
        ([began(1), event("ended", 2, 6)], True, "done"),
        ([began(1), event("ended", 2, 6)], False, "waiting"),  # Snakemake took its outputs away, to make them anew
        ([began(1), event("ended", 2, 6), began(NOW - 9)], False, "running"),
        ([], True, "done"),  # made before there was a timeline
    ],
)
def test_states(needs, tmp_path, lines, whole, state):
    if whole:
        (folder_of(needs, tmp_path) / "run.json").write_text(RECORD)
    found = told(needs, tmp_path, *lines)
    assert found["state"] == state
    assert found["updates"] == {"waiting": 0, "done": 6}.get(state, found["updates"])
    if whole and not lines:
        assert found["hours"] == 0.5
    if state == "silent":
        text = progress.as_text(shown(needs, [found]))
        assert "silent since" in text and "killed" not in text and "dead" not in text
    if state == "stopped":
        assert "stopped: SIGUSR1" in progress.as_text(shown(needs, [found]))


def shown(needs, rows):
    factor = progress.with_time_left(rows)
    states = {state: sum(row["state"] == state for row in rows) for state in progress.STATES}
    fields = {"hours": sum(row["hours"] for row in rows), "estimated_hours": None, "left_s": {"tuning": 1.0}}
    fields |= {"scale": "smoke", "runs": rows, "images": [], "before": [], "states": states}
    return fields | {"measured_against_expected": factor}


def test_a_probe_far_back_in_a_long_log_is_found(needs, tmp_path):
    lines = [{"event": "probe", "update": 0, "reward": 7.0}]
    lines += [{"event": "update", "update": n, "loss": 0.5, "filler": "x" * 1000} for n in range(1, 301)]
    write(folder_of(needs, tmp_path) / "train.jsonl", *lines)
    assert (folder_of(needs, tmp_path) / "train.jsonl").stat().st_size > progress.TAIL_BYTES
    found = progress.last_lines(folder_of(needs, tmp_path) / "train.jsonl")
    assert found["probe"]["reward"] == 7.0 and found["update"]["update"] == 300


def test_numbers_that_are_none_are_left_out(needs, tmp_path):
    line = {"event": "update", "update": 1, "loss": float("nan"), "margin": "high", "implicit_accuracy": None}
    write(folder_of(needs, tmp_path) / "train.jsonl", line)
    found = told(needs, tmp_path, began(NOW - 9))
    assert [found[k] for k in ("loss", "margin", "implicit_accuracy")] == [None] * 3 and found["updates"] == 1


def test_waiting_runs_take_what_was_expected_times_what_others_took():
    rows = [
        {"seconds_per_update": 3.0, "planned": 100, "updates": 40, "expected_s": 200.0},
        {"seconds_per_update": None, "planned": 10, "updates": 0, "expected_s": 50.0},
    ]
    assert progress.with_time_left(rows) == 1.5
    assert [row["left_s"] for row in rows] == [180.0, 75.0]
    alone = rows[1:]
    assert progress.with_time_left(alone) is None and alone[0]["left_s"] == 50.0


# ---- files that are half there ----


def files_of_one(needs, results):
    """Of a run and its model, all that is read, as whole as can be."""
    folder = folder_of(needs, results)
    lines = [began(1000, gpus=2), event("at", 1300, 3), event("stopped", 1400, 3, why="ended by scancel, été"),
             began(NOW - 90, update=3, gpus=2), event("at", NOW - 20, 5)]  # fmt: skip
    write(folder / "timeline.jsonl", *lines)
    train = [{"event": "probe", "update": 0, "kl": {"3": 1e-6}, "reward": 19.5}]
    train += [{"event": "update", "update": n, "loss": 0.69, "margin": -0.5, "implicit_accuracy": 0.5} for n in (4, 5)]
    write(folder / "train.jsonl", *train)
    record = {"cost": {"wall_s": 60.0}, "hardware": {"gpus": ["a", "b"]}}
    (folder / "run.json").write_text(json.dumps(record))
    these = jobs(needs.config, "sdxl_dmd2", "preference")
    listed = [{**asdict(job), "shards": [{"file": "shard0.parquet", "images": 8}]} for job in these]
    path = manifest(model_dir("smoke", "preference", "sdxl_dmd2", results), "images")
    path.write_text(json.dumps({"images": listed}))
    return [folder / name for name in ("timeline.jsonl", "train.jsonl", "run.json")] + [path]


def look(needs, results):
    row = progress.told(needs, ONLINE, results, NOW)
    pictures = progress.pictures(needs, "preference", "sdxl_dmd2", results)
    return row, pictures, progress.as_text(shown(needs, [row]) | {"images": [pictures]})


def test_any_prefix_of_any_file_gives_a_table(needs, tmp_path):
    files = files_of_one(needs, tmp_path)
    whole, states = look(needs, tmp_path), set()
    for path in files:
        content = path.read_bytes()
        for end in range(0, len(content), 1 if len(content) < 700 else 29):
            path.write_bytes(content[:end])
            row, pictures, text = look(needs, tmp_path)
            states.add(row["state"])
            assert ONLINE.method in text and 0 <= row["updates"] <= row["planned"] and row["hours"] >= 0
            assert pictures["shards"] > 0
            json.dumps([row, pictures], allow_nan=False)
        path.write_bytes(content)
    assert look(needs, tmp_path) == whole
    assert {"running", "silent", "stopped", "done"} <= states


CHUNK = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"\n",
            b'{"event": "began", "time": 5, "update": 2}\n',
            b'{"event": "began", "time": 5, "update": 2, "planned": 6, "processes": 1, "gpus": 2, "started": 9}\n',
            b'{"event": "at", "time": 1e400, "update": 3}\n',
            b'{"event": "at", "time": 2, "update": 1}\n',
            b'{"event": "ended", "time": 7, "update": 9e9}\n',
            b'{"event": "stopped", "time": 1, "update": -4, "why": 3}\n',
            b'{"event": "update", "update": 2, "loss": []}\n',
            b'{"event": "probe", "update": 2, "reward": "high"}\n',
            b'{"event": "probe", "reward": 20.0}\n',
        ]
    ),
)


@given(st.sampled_from(range(2)), st.lists(CHUNK, max_size=6).map(b"".join))
def test_any_bytes_in_a_log_give_a_table(needs, tmp_path_factory, which, content):
    results = tmp_path_factory.mktemp("any")
    path = files_of_one(needs, results)[which]
    path.write_bytes(content)
    row, pictures, text = look(needs, results)
    assert row["state"] in progress.STATES and ONLINE.method in text
    json.dumps([row, pictures], allow_nan=False)
    shutil.rmtree(results)


def test_what_vanishes_while_it_looks_is_not_missed(needs, tmp_path, monkeypatch):
    """Snakemake takes a job's outputs away when it makes them anew."""
    files = files_of_one(needs, tmp_path)

    def gone(*_):
        for path in files:
            path.unlink(missing_ok=True)
        raise FileNotFoundError

    monkeypatch.setattr(progress.os, "listdir", gone)
    monkeypatch.setattr(progress, "open", gone, raising=False)
    row, pictures, _ = look(needs, tmp_path)
    assert row["state"] == "running" and pictures["shards_there"] == 0


# ---- images and scores ----


def test_shards_and_scores_that_are_there_are_counted(needs, tmp_path):
    config, results = needs.config, tmp_path
    job = jobs(config, "sdxl_dmd2", "preference")[0]
    before = progress.pictures(needs, "preference", "sdxl_dmd2", results)
    assert before["shards_there"] == before["scores_there"] == 0 and before["left_s"] > 0
    names, folder = metrics(config, "preference"), job.images("smoke", results)
    assert before["scores"] == len(names) * len(jobs(config, "sdxl_dmd2", "preference")) > 20
    folder.mkdir(parents=True)
    for name in ("shard0.parquet", ".shard1.parquet.x.part", "shard9.parquet"):  # half-written, left from before
        (folder / name).touch()
    file = job.scores("smoke", names[0], results)
    file.parent.mkdir(parents=True)
    file.touch()
    after = progress.pictures(needs, "preference", "sdxl_dmd2", results)
    assert (after["shards_there"], after["scores_there"]) == (1, 1)
    assert {k: after[k] for k in ("shards", "scores")} == {k: before[k] for k in ("shards", "scores")}
    assert after["left_s"] < before["left_s"]


def test_images_json_says_how_many_shards_there_are(needs, tmp_path):
    these = jobs(needs.config, "sdxl_dmd2", "preference")
    path = manifest(model_dir("smoke", "preference", "sdxl_dmd2", tmp_path), "images")
    path.parent.mkdir(parents=True)
    listed = [{**asdict(job), "shards": [{}, {}, {}]} for job in these]
    path.write_text(json.dumps({"images": listed}))
    assert progress.pictures(needs, "preference", "sdxl_dmd2", tmp_path)["shards"] == 3 * len(these)


def test_a_shard_holds_as_many_batches_as_generate_makes():
    from eval import generate

    assert progress.SHARD_BLOCKS == generate.SHARD_BLOCKS


# ---- the whole ----


def test_the_estimate_stands_beside_what_was_spent(tmp_path):
    config = load(
        {"scale": "paper", "tables": ["table2"], "datasets": {"pickapic_v2": {"repo": "liuhuohuo2/pick-a-pic-v2"}}}
    )
    found = progress.progress(config, tmp_path, NOW)
    told = estimate.estimate(config)
    hours = {job["job"]: job["gpu_hours"] for job in told["jobs"] if job["rule"] == "tune"}
    names = ["{task} {model} {method} seed{seed}".format(**row["run"]) for row in found["runs"]]
    assert {n: row["estimated_hours"] for n, row in zip(names, found["runs"], strict=True)} == pytest.approx(hours)
    assert found["estimated_hours"] == pytest.approx(told["rules"]["tune"]["gpu_hours"])
    assert sum(found["left_s"].values()) > found["estimated_hours"] * HOUR
    assert [row["rule"] for row in found["before"]] == ["fetch", "latents", "texts", "embeddings", "preference_model"]


@pytest.mark.parametrize("scale", ["smoke", "miniature", "rehearsal", "paper"])
def test_every_scale_has_a_table(scale, tmp_path):
    config = load({"scale": scale})
    found = progress.progress(config, tmp_path)
    assert found["states"]["waiting"] == len(found["runs"]) > 30
    assert (found["estimated_hours"] is None) == (scale in ("smoke", "miniature"))
    assert progress.as_text(found).count("\n") > len(found["runs"])


def test_it_only_reads_and_json_tells_the_same(tmp_path, needs):
    told(needs, tmp_path / "results", began(1000), event("at", 1060, 3))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    flags = ["--set", json.dumps({"scale": "smoke", "tables": ["table1"]})]
    text, doctor, as_json = (
        run("python", "-m", *command, *flags, cwd=tmp_path)
        for command in (["pso.progress"], ["pso.doctor", "--progress"], ["pso.progress", "--json"])
    )
    assert text.returncode == doctor.returncode == as_json.returncode == 0, text.stderr + doctor.stderr
    found = json.loads(as_json.stdout)
    assert text.stdout == doctor.stdout
    assert f"smoke: {len(found['runs'])} runs, 1 silent, " in text.stdout
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_it_is_told_while_a_workflow_runs(tmp_path):
    """Whose lock is on all of its files."""
    locks = tmp_path / ".snakemake" / "locks"
    locks.mkdir(parents=True)
    (locks / "0.output.lock").write_text("results/smoke/hub/data.json\nresults/smoke/claims.md\n")
    refused = snakemake("hub_data", cwd=tmp_path)
    assert refused.returncode != 0 and "locked" in (refused.stdout + refused.stderr).lower()
    done = snakemake("progress", cwd=tmp_path)
    assert done.returncode == 0 and "of 252 updates." in done.stdout, done.stderr


def test_a_finished_workflow_is_done(smoke):
    config = load({"scale": "smoke"})
    found = progress.progress(config, smoke / "results")
    assert found["states"]["done"] == len(found["runs"]) > 40
    assert all(row["loss"] is not None and row["hours"] > 0 for row in found["runs"])
    for row in found["images"]:
        assert (row["shards_there"], row["scores_there"]) == (row["shards"], row["scores"])
        these = jobs(config, row["model"], row["task"])
        listed = progress.listed_shards(model_dir("smoke", row["task"], row["model"], smoke / "results"))
        assert sum(listed.values()) == row["shards"] and len(listed) == len(these)
    assert sum(found["left_s"].values()) == 0
    assert all(row["there"] == row["wanted"] for row in found["before"])


def test_what_is_expected_before_images_json_is_what_is_made(smoke, monkeypatch):
    needs = Needs(load({"scale": "smoke"}))
    shown = {(job.task.partition("/")[0], job.model) for job in jobs(needs.config)}
    made = [progress.pictures(needs, *one, smoke / "results") for one in sorted(shown)]
    monkeypatch.setattr(progress, "listed_shards", lambda folder: {})
    assert [progress.pictures(needs, *one, smoke / "results") for one in sorted(shown)] == made
