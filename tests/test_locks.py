"""One process at a time in a folder: live, dead, foreign and vanished holders."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, run, smoke_settings
from hubs import last_line

from pso import locks
from pso.locks import locked
from pso.provenance import UserError

HOLD = """
import sys, time
from pso.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "seed0" / ".lock"


@pytest.fixture
def holder(path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def refused(path) -> str:
    with pytest.raises(UserError) as caught, locked(path):
        pass
    return str(caught.value)


def test_a_second_process_is_refused_in_one_sentence_and_the_first_goes_on(path, holder):
    said = refused(path)
    assert said.startswith(f"{path.parent} is in use by another process, which holds .lock; wait until it ends")
    assert path.exists() and holder.poll() is None
    assert refused(path) == said  # a refusal does not break the lock


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_is_stale_at_once(path, holder, how, caplog):
    holder.send_signal(how)
    holder.wait()
    assert path.exists()
    with locked(path):
        pass
    assert not path.exists() and caplog.messages == []


def test_the_file_goes_with_the_lock_and_names_nobody(path):
    with locked(path):
        while not path.read_text():
            pass
        told = path.read_text()
    assert not path.exists() and set(json.loads(told)) == {"machine", "holder", "beat"}
    assert os.uname().nodename not in told and str(os.getpid()) not in json.loads(told)["holder"]


def test_a_lock_that_goes_away_between_opening_and_locking_is_made_anew(path, monkeypatch):
    flock, seen = fcntl.flock, []

    def lose_it_once(handle, how):
        flock(handle, how)
        if not seen:
            seen.append(path.unlink())

    monkeypatch.setattr(fcntl, "flock", lose_it_once)
    with locked(path):
        assert path.exists() and len(seen) == 1


def foreign(path, **more) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"machine": "another", "holder": "1", "beat": 7, **more}))


def test_a_silent_holder_on_another_machine_is_gone(path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "SILENT_S", 0.2)
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    foreign(path)
    with locked(path):
        pass
    assert "its holder is gone; this process goes on in its place" in caplog.messages[-1]


def test_a_beating_holder_on_another_machine_is_alive(path, monkeypatch):
    monkeypatch.setattr(locks, "SILENT_S", 5.0)
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    foreign(path)
    beat = threading.Timer(0.1, lambda: path.write_text(json.dumps({"machine": "another", "holder": "1", "beat": 8})))
    beat.start()
    assert "is in use by another process" in refused(path)
    beat.join()
    assert path.exists()


@pytest.mark.parametrize("machine", ["another", None])
def test_without_locks_of_the_kernel_beats_decide_on_any_machine(path, monkeypatch, machine):
    def unsupported(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(locks, "SILENT_S", 1.0)
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    with locked(path):
        assert "is in use by another process" in refused(path)
    path.write_text(json.dumps({"machine": machine or locks._machine(), "holder": "1", "beat": 7}))
    with locked(path):  # left by a holder that is silent
        pass


def test_of_two_that_begin_at_once_without_locks_of_the_kernel_one_goes_on(path, monkeypatch):
    def unsupported(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(locks, "SILENT_S", 0.3)
    monkeypatch.setattr(locks, "BEAT_S", 0.3)
    started = threading.Barrier(2)
    monkeypatch.setattr(locks, "_refuse_if_beating", lambda *_: started.wait())  # both saw an empty file
    found = []

    def begin():
        try:
            with locked(path):
                found.append("in")
                time.sleep(1)
        except UserError:
            found.append("refused")

    threads = [threading.Thread(target=begin) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(found) == ["in", "refused"]


def test_a_file_that_is_no_lock_of_ours_is_no_holder(path):
    path.parent.mkdir(parents=True)
    path.write_text("[1, 2")
    with locked(path):
        pass


@pytest.mark.parametrize(("module", "file"), [("generate", ".generate.lock"), ("score", ".score.lock")])
def test_pictures_and_scores_of_a_model_are_made_by_one_process(module, file, tmp_path):
    here = tmp_path / "smoke" / "preference" / "sdxl_dmd2"
    with locked(here / file):
        chosen = ["--model", "sdxl_dmd2", "--task", "preference", "--results", str(tmp_path)]
        line = last_line(run("python", "-m", f"eval.{module}", *chosen, "--set", smoke_settings()))
    assert line.startswith(f"{module}: {here} is in use by another process, which holds {file}")


def test_several_are_held_together_or_not_at_all(tmp_path, path):
    with locked(path), pytest.raises(UserError), locked(tmp_path / "a" / ".lock", path):
        pass
    assert not list(tmp_path.rglob(".lock"))
