"""Files that are whole or absent, fingerprints of code, and records that give nobody away."""

import errno
import getpass
import hashlib
import json
import os
import re
import resource
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from pso import provenance
from pso.config import load
from pso.hub import Hub
from pso.provenance import (
    Meter,
    UserError,
    atomic,
    code_state,
    digest,
    fingerprint,
    record,
    sentences,
    sha256_of,
    write_json,
)
from pso.trackers import hyperparameters
from pso.tune import Run, decided_by, resolved

REPOSITORY = Path(__file__).resolve().parent.parent


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- files ----


@pytest.fixture
def old(tmp_path):
    """A file that is there already."""
    path = tmp_path / "run.json"
    path.write_text("old")
    return path


def only(path: Path, content: str) -> bool:
    """Whether a folder holds this file alone, with this content."""
    return list(path.parent.iterdir()) == [path] and path.read_text() == content


def test_a_written_file_has_its_name_and_nothing_else_lies_beside_it(old):
    with atomic(old) as part:
        part.write_text("new")
    assert only(old, "new")


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(old):
    with atomic(old) as part:
        part.write_text("ne")
        assert old.read_text() == "old"
        part.write_text("new")


def test_folders_are_made(tmp_path):
    write_json(tmp_path / "a" / "b" / "run.json", {"x": 1})
    assert json.loads((tmp_path / "a" / "b" / "run.json").read_text()) == {"x": 1}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), UserError("put it right")], ids=repr)
def test_a_failure_in_the_body_keeps_the_old_file_and_passes_on(old, error):
    with pytest.raises(type(error)) as caught, atomic(old) as part:
        part.write_text("half")
        raise error
    assert caught.value is error and only(old, "old")


def test_a_failure_in_the_body_leaves_no_file_where_there_was_none(tmp_path):
    with pytest.raises(ValueError, match="no"), atomic(tmp_path / "run.json") as part:
        part.write_text("half")
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_writing_is_one_sentence_and_keeps_the_old_file(old, monkeypatch):
    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(UserError) as caught:
        write_json(old, {"x": 1})
    monkeypatch.undo()
    text = str(caught.value)
    assert text.startswith(f"could not write {old}: No space left on device; ") and "\n" not in text
    assert "run the same command again" in text and only(old, "old")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_only_at_the_end_keeps_the_old_file(old, monkeypatch, call):
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(UserError, match="No space left"), atomic(old) as part:
        part.write_text("new")
    monkeypatch.undo()
    assert only(old, "old")


def test_the_content_is_on_disk_before_the_file_takes_its_name(tmp_path, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.fstat(fd).st_size), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    with atomic(tmp_path / "x") as part:
        part.write_text("four")
    assert calls == [4, "replace"]


def test_what_a_killed_writer_left_goes_with_the_next_writing_of_the_same_file(tmp_path):
    code = "import os, sys\nfrom pathlib import Path\nfrom pso.provenance import atomic\n"
    code += "with atomic(Path(sys.argv[1])) as part:\n    part.write_text('ha')\n    os.kill(os.getpid(), 9)"
    for name in ("run.json", "run.jsonl", "run.json"):
        assert subprocess.run([sys.executable, "-c", code, tmp_path / name], cwd=ROOT).returncode == -9
    left = sorted(path.name.split(".")[1:3] for path in tmp_path.iterdir())
    assert left == [["run", "json"], ["run", "jsonl"]]  # the third writer removed what the first had left
    with atomic(tmp_path / "run.json") as part:
        part.write_text("whole")
    assert sorted(path.name[:10] for path in tmp_path.iterdir()) == [".run.jsonl", "run.json"]


def test_two_writers_of_one_file_leave_each_other_alone(tmp_path):
    with atomic(tmp_path / "x") as first:
        first.write_text("first")
        with atomic(tmp_path / "x") as second:
            second.write_text("second")
        assert first.exists() and (tmp_path / "x").read_text() == "second"
    assert (tmp_path / "x").read_text() == "first"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_a_written_file_has_the_rights_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "x.json", {})
        assert os.umask(mask) == mask, "the umask was not put back"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o666 & ~mask


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write"):
        write_json(tmp_path / "file" / "run.json", {})


FULL_DEVICE = """
import resource, signal, sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
import toy
from eval.generate import Shard, Wanted
from pso.checkpoint import Checkpoints
from pso.journal import Journal
from pso.provenance import Meter, atomic, sentences

path = Path(sys.argv[1])
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
policy = toy.new_policy(moved=0.1)
optimizer = torch.optim.AdamW(policy.lora_parameters())
for parameter in policy.lora_parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()
checkpoints = Checkpoints(path, {}, Meter())
checkpoints.save(1, policy, optimizer, None)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with sentences("job"):
    WRITE
"""
TENSORS = "{'x': torch.zeros(5000)}"
WRITERS = {  # name: (statement, what is named besides `path`, files below path that stay)
    "image shard": ("s = Shard(path / 'a', {}); s.add([Wanted('p', 0, 'x')], [picture]); s.write()", "a", []),
    "tensors": (f"with atomic(path / 'a') as part: save_file({TENSORS}, part)", "a", []),
    "LoRA": ("policy.save_lora(path)", "pytorch_lora_weights.safetensors", []),
    "checkpoint": ("checkpoints.save(2, policy, optimizer, None)", "update0000002", []),
    "log": ("journal = Journal(path / 'a', 0, 9)\n    while True: journal.write({'update': 1})", "a", ["a"]),
    "unforeseen": ("(path / 'a').write_bytes(bytes(5000))", None, ["a"]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_device_ends_in_one_sentence_and_leaves_nothing_half_written(tmp_path, name):
    statement, named, left = WRITERS[name]
    command = [sys.executable, "-c", FULL_DEVICE.replace("WRITE", statement), str(tmp_path)]
    variables = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("job: could not ") and "File too large" in said and "run the same command again" in said
    assert named is None or f"{tmp_path / named}: " in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "update0000001"]
    if name == "log":
        lines = (tmp_path / "a").read_text().splitlines(keepends=True)
        assert len(lines) > 200 and set(lines) == {'{"update": 1}\n'}


def test_a_command_ends_with_the_sentence_and_code_1(capsys):
    with pytest.raises(SystemExit) as ended, sentences("tune"):
        raise UserError("x is 1; expected 2.")
    assert ended.value.code == "tune: x is 1; expected 2."  # a text as code: printed to stderr, exit status 1


def test_a_failed_read_or_write_that_nobody_foresaw_ends_with_a_sentence(tmp_path):
    with pytest.raises(SystemExit) as ended, sentences("tune"):
        (tmp_path / "none").read_text()
    said = ended.value.code
    assert said.startswith(f"tune: could not read or write {tmp_path / 'none'}: No such file or directory; ")
    with pytest.raises(SystemExit) as ended, sentences("tune"):
        raise OSError("no file name")
    assert ended.value.code.startswith("tune: could not read or write no file name; ")


def test_a_mistake_of_the_program_is_not_dressed_up_as_the_users():
    with pytest.raises(KeyError), sentences("tune"):
        raise KeyError("bug")


# ---- hashes and fingerprints ----


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=10,
)


def reversed_keys(content):
    if isinstance(content, dict):
        return {key: reversed_keys(content[key]) for key in reversed(content)}
    return [reversed_keys(v) for v in content] if isinstance(content, list) else content


@given(JSON)
def test_a_digest_does_not_depend_on_the_order_of_keys(content):
    assert digest(content) == digest(reversed_keys(content))
    assert re.fullmatch("[0-9a-f]{16}", digest(content))


@given(JSON, JSON)
def test_a_digest_tells_contents_apart(one, other):
    assert (digest(one) == digest(other)) == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))


def test_a_digest_is_the_same_in_every_version_of_this_project():
    text = b'{"a": [1, 2.5, null], "b": "x"}'
    assert digest({"b": "x", "a": [1, 2.5, None]}) == hashlib.sha256(text).hexdigest()[:16]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """write(text) puts a module's code under a made-up repository and returns its fingerprint."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "pkg").mkdir()

    def write(text: str, name: str = "pkg.mod") -> str:
        (tmp_path / (name.split(":")[0].replace(".", "/") + ".py")).write_text(text)
        return fingerprint(name)

    return write


CODE = "def f(x):\n    return x + 1\n"


@pytest.mark.parametrize(
    "same",
    ["# why\ndef f(x):  # what\n    return x + 1\n", "\n\ndef f( x ) :\n\n        return (x\n          +1)\n"],
    ids=["comments", "layout"],
)
def test_comments_and_layout_do_not_change_a_fingerprint(module, same):
    assert module(CODE) == module(same)


@pytest.mark.parametrize("other", ["def f(x):\n    return x - 1\n", "def f(y):\n    return y + 1\n", CODE + "A = 1\n"])
def test_other_code_changes_a_fingerprint(module, other):
    assert module(CODE) != module(other)


def test_a_fingerprint_knows_which_module_holds_the_code(module):
    assert module(CODE, "pkg.mod") != module(CODE, "pkg.other")


def test_a_fingerprint_of_several_modules_sees_each_of_them(module):
    module(CODE, "pkg.mod")
    module(CODE, "pkg.other")
    before = fingerprint("pkg.mod", "pkg.other")
    module("A = 2\n", "pkg.other")
    assert fingerprint("pkg.mod", "pkg.other") != before


def test_a_module_from_elsewhere_counts_by_its_name(module):
    assert fingerprint("elsewhere.one") == fingerprint("elsewhere.one") != fingerprint("elsewhere.two")


def test_a_module_of_the_users_counts_by_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "method_of_the_user.py").write_text(CODE)
    before = fingerprint("method_of_the_user")
    (tmp_path / "method_of_the_user.py").write_text("# why\n" + CODE)
    assert fingerprint("method_of_the_user") == before
    (tmp_path / "method_of_the_user.py").write_text(CODE + "A = 1\n")
    assert fingerprint("method_of_the_user") != before


def test_a_fingerprint_of_an_object_sees_its_modules_code(module):
    assert module(CODE, "pkg.mod:f") != module("def f(x):\n    return 0\n", "pkg.mod:f")


def git(folder: Path, *words: str) -> str:
    named = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *named, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text(CODE)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "x")
    return tmp_path


def test_the_state_of_the_code_is_its_commit_and_what_differs(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert code_state() == {"commit": commit, "dirty": None}
    (repository / "a.py").write_text("A = 1\n")
    changed = code_state()
    assert changed["commit"] == commit and re.fullmatch("[0-9a-f]{16}", changed["dirty"])


def test_a_new_module_makes_the_state_dirty(repository):
    (repository / "b.py").write_text("A = 1\n")
    assert code_state()["dirty"] is not None


def test_without_git_there_is_no_commit_and_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "none")
    assert code_state() == {"commit": None, "dirty": None}


# ---- records ----


@pytest.fixture
def written(tmp_path):
    """A record as a job writes it, with the whole configuration and a file of a hub as input."""
    (tmp_path / "hub" / "some" / "model").mkdir(parents=True)
    (tmp_path / "hub" / "some" / "model" / "weights.bin").write_bytes(b"abc")
    hub = Hub(tmp_path / "hub")
    hub.file("some/model", "weights.bin")
    settings = load({"scale": "smoke"}).model_dump()
    return record("tune", settings, hub.inputs(), Meter(), steps={"planned": 6, "done": 6})


def test_a_record_names_no_host_user_home_or_folder(written, tmp_path):
    text = json.dumps(written)
    for secret in (str(Path.home()), str(REPOSITORY), str(tmp_path), os.getcwd(), sys.prefix):
        assert secret == "/" or secret not in text, secret
    for secret in (socket.gethostname(), socket.getfqdn(), getpass.getuser()):
        assert not re.search(rf"\b{re.escape(secret)}\b", text), secret


def test_weights_in_a_folder_of_ones_own_are_told_by_name_in_records_and_to_trackers(tmp_path):
    own = {"repo": str(tmp_path / "my_unet"), "file": "w.bin"}
    weights = {"unet": own, "loras": [own], "deltas": [{**own, "minus": own["repo"]}], "vae": own["repo"]}
    config = load({"scale": "smoke", "models": {"sdxl_dmd2": {**weights, "preview_vae": own["repo"]}}})
    run = Run(config, "preference", "sdxl_dmd2", "pso_offline", 0, tmp_path, tmp_path)
    settings = resolved(run, SimpleNamespace(cfg=run.entry.tune))  # any settings in place of the objective's
    assert settings["model"]["sdxl_dmd2"]["unet"] == {"repo": "./my_unet", "file": "w.bin", "subfolder": None}
    found = {**record("tune", settings, [], Meter(), **decided_by(run)), "trackers": hyperparameters(settings)}
    assert json.dumps(found).count("./my_unet") >= 15 and str(tmp_path) not in json.dumps(found)


def test_a_record_holds_no_value_of_the_environment_that_looks_secret(written, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijk")
    assert "hf_abcdefghijk" not in json.dumps(record("tune", {}, [], Meter()))


def test_a_record_says_what_was_asked_by_which_code_from_what_at_what_cost(written):
    assert written["config_digest"] == digest(written["config"])
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", FIPS 180-2
    assert written["inputs"] == [{"repo": "some/model", "file": "weights.bin", "sha256": sha256}]
    assert {"job", "code", "versions", "hardware", "cost", "steps", "schema_version"} <= set(written)
    assert written["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_meter_adds_the_counts_of_the_job():
    meter = Meter()
    meter.counts = {"unet_forwards": 12, "images": 3}
    cost = meter.cost()
    assert (cost["unet_forwards"], cost["images"]) == (12, 3)


def test_a_meter_adds_the_sessions_before_and_keeps_the_highest_peak():
    meter = Meter()
    meter.counts = {"unet_forwards": 12}
    meter.earlier = {"wall_s": 1e6, "cpu_s": 9e5, "unet_forwards": 30, "peak_rss_gib": 500.0}
    cost, alone = meter.cost(), Meter().cost()
    assert cost["wall_s"] >= 1e6 and cost["cpu_s"] >= 9e5 and cost["unet_forwards"] == 42
    assert cost["peak_rss_gib"] == 500 and 0 < alone["peak_rss_gib"] < 500 and alone["cpu_s"] < 9e5  # a process's own


def test_a_meter_tells_waiting_from_computing():
    meter = Meter()
    time.sleep(0.3)
    end = time.process_time() + 0.4
    while time.process_time() < end:
        pass
    cost = meter.cost()
    assert cost["wall_s"] >= 0.6 and 0.3 <= cost["cpu_s"] <= cost["wall_s"] - 0.1


def test_a_meter_gives_the_peak_memory_in_gib():
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    cost = Meter().cost()
    assert cost["peak_rss_gib"] == pytest.approx(kib / 1024**2, rel=0.05, abs=0.02)
    assert cost["peak_rss_gib"] * 2**20 <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.1 + 2**14
