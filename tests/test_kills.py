"""Kills at drawn instants: the short version of tests/kills.py, and its own eyes."""

import json

import pytest
from kills import Plan, Training, settings, whole_run
from same import differing, unfinished
from shim import program
from warm import warm

EVERY, START_S = 4, 5.0  # updates between checkpoints; a process that imports torch
ASKED = settings(("pso_online",), 12, EVERY)
QUOTA = {"tune": 3, "generate": 2, "score": 2, "table": 1, "diff": 1, "claims": 1}
FEW = dict.fromkeys(QUOTA, 0) | {"tune": 1, "generate": 1}


@pytest.fixture(scope="module")
def python():
    with warm() as socket:
        yield socket


@pytest.fixture(scope="module")
def undisturbed(smoke, python, tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("undisturbed"), smoke / "results/smoke", ASKED, 2, python)


def check(watch, undisturbed) -> None:
    assert {kill.stage for kill in watch.kills} & {"tune", "generate"}
    assert differing(watch.base, undisturbed.base) == [] and unfinished(watch.base) == []
    assert all(updates <= EVERY for run in watch.trainings.values() for updates in run.repeated)


def test_killed_jobs_and_a_killed_snakemake_change_nothing(smoke, undisturbed, python, tmp_path):
    plan = Plan(0, 0, undisturbed.durations, QUOTA)
    watch = whole_run(tmp_path, smoke / "results/smoke", ASKED, 2, python, plan, 100)
    assert len(watch.kills) >= 3
    check(watch, undisturbed)


def test_kills_of_processes_started_as_users_do_change_nothing(smoke, undisturbed, tmp_path):
    durations = {job: seconds + START_S for job, seconds in undisturbed.durations.items()}
    check(whole_run(tmp_path, smoke / "results/smoke", ASKED, 2, None, Plan(1, 0, durations, FEW), 100), undisturbed)


# ---- what is drawn and what is seen ----


def test_the_program_behind_the_launcher_is_seen():
    tune = ["-m", "pso.tune", "--seed", "0"]
    assert program(["-m", "pso.launch", "--gpus", "1", "--cpus", "2", *tune]) == program(tune) == tune


def test_the_plan_follows_from_seed_workflow_job_and_attempt():
    durations = {"tune pso_online": 10.0, "score": 2.0, "snakemake": 30.0}
    kills = {
        (seed, workflow, job, attempt): Plan(seed, workflow, durations).kill(job, attempt)
        for seed in (0, 1) for workflow in (0, 1) for job in ("tune pso_online", "score") for attempt in (1, 2)
    }  # fmt: skip
    assert len({kill[0] for kill in kills.values()}) == len(kills)
    assert all(0 <= kill[0] <= durations[key[2]] for key, kill in kills.items())
    assert Plan(0, 0, durations).kill("score", 2) == kills[0, 0, "score", 2]
    assert Plan(0, 0, durations).kill("score", 99) is None
    instants = [Plan(seed, 0, durations).kill_snakemake() for seed in range(50)]
    assert {node for _, _, node in instants} == {True, False} and len({number for _, number, _ in instants}) == 2


def trained(folder, to: int, said: str = "") -> None:
    """A process of a run logged up to an update."""
    (folder / "train.jsonl").write_text("".join(json.dumps({"update": k}) + "\n" for k in range(1, to + 1)) + '{"upd')
    with open(folder / "tune.log", "a") as log:
        log.write(said)


@pytest.mark.parametrize(
    ("sessions", "repeated"),
    [
        ([(7, ""), (12, "continuing after update 4\n")], [3]),
        ([(7, ""), (7, ""), (9, "continuing after update 4\n"), (12, "continuing after update 8\n")], [3, 1]),
        ([(7, ""), (2, ""), (12, "continuing after update 0\n")], [7, 2]),  # begun anew, without a word
        ([(12, "")], []),
        ([], []),
    ],
)
def test_updates_made_twice_are_counted(tmp_path, sessions, repeated):
    run = Training(tmp_path)
    for to, said in sessions:
        trained(tmp_path, to, said)
        run.ended()
    assert run.repeated == repeated


@pytest.mark.parametrize("change", ["one bit", "one more", "one less", "a record", "costs alone", "a log alone"])
def test_folders_are_compared_file_by_file(tmp_path, change):
    for name in ("ours", "theirs"):
        (tmp_path / name / "run").mkdir(parents=True)
        for file, text in {"a": "text", "run.json": '{"cost": 1, "seed": 0}', "tune.log": "said"}.items():
            (tmp_path / name / "run" / file).write_text(text)
    run = tmp_path / "ours" / "run"
    {
        "one bit": lambda: (run / "a").write_text("texu"),
        "one more": lambda: (run / "b").write_text(""),
        "one less": lambda: (run / "a").unlink(),
        "a record": lambda: (run / "run.json").write_text('{"cost": 1, "seed": 1}'),
        "costs alone": lambda: (run / "run.json").write_text('{"cost": 2, "seed": 0}'),
        "a log alone": lambda: (run / "tune.log").write_text("said more"),
    }[change]()
    found = {"one bit": ["run/a"], "one more": ["run/b"], "one less": ["run/a"], "a record": ["run/run.json"]}
    assert differing(tmp_path / "ours", tmp_path / "theirs") == found.get(change, [])


@pytest.mark.parametrize("name", [".shard0.parquet.x.part", "state/update0000004", ".state.done/x", ".tune.lock"])
def test_what_an_interrupted_job_left_is_seen(tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    assert unfinished(tmp_path) == [str((tmp_path / "run" / name.split("/")[0]).relative_to(tmp_path))]
