"""Published repositories from a hub of our own, with every way in which they may fail."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import httpx2
import pytest
from conftest import ROOT, run, snakemake
from fake_hub import API, BAD_TOKEN, GATED, GATED_401, NOT_FOUND, UNKNOWN, FakeHub, Fault, git_sha1, set_process
from huggingface_hub import constants, hf_hub_download

from pso import fetch as fetching
from pso import remote
from pso.config import OFFLINE_VARIABLE, job_environment, load
from pso.entries import RepositoryEntry
from pso.fetch import fetch
from pso.lockfile import read_lock, write_once
from pso.provenance import UserError
from pso.remote import Refusal
from pso.replacing import replacement
from pso.steps import published_entry

NAME = "acme/model"
BIG = bytes(range(256)) * 4096  # 1 MiB
FILES = {"config.json": b'{"a": 1}', "unet/model.safetensors": BIG, "README.md": b"not asked for"}
TOKEN = "hf_secretsecretsecret"


@pytest.fixture(scope="module")
def paper():
    return load({"scale": "paper"})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """This process takes the fake hub for the real one; waits are written down and not waited."""
    with FakeHub() as found:
        set_process(monkeypatch, found, tmp_path / "home")
        yield found


def entry(**fields) -> RepositoryEntry:
    fields = {"files": ["config.json", "unet/model*.safetensors"], "size_gb": 0.1, "licence": "MIT"} | fields
    return RepositoryEntry(**fields)


def with_entries(paper, **entries):
    """The paper's configuration with repositories of the tests'."""
    found = {name.replace("__", "/"): one for name, one in entries.items()}
    return paper.model_copy(update={"repositories": paper.repositories | found})


def fetched(config, tmp_path, name=NAME):
    step = fetch(config, name, tmp_path / "results", tmp_path / "hub.lock.json")
    return json.loads(step.read_text())


def folder(tmp_path, name=NAME):
    return tmp_path / "results/paper/hub" / name


def assert_nothing_under_a_final_name(tmp_path, name=NAME):
    """No step file, nothing in the hub folder, and in the cache only what is whole."""
    assert not list((tmp_path / "results").rglob("*.json"))
    assert not [path for path in folder(tmp_path, name).rglob("*") if not path.is_dir()]
    for blob in (tmp_path / "home").rglob("blobs/*"):
        if blob.suffix != ".part":
            content = blob.read_bytes()
            assert blob.name in (hashlib.sha256(content).hexdigest(), git_sha1(content))


# ---- what is fetched ----


@pytest.mark.parametrize(("kind", "source"), [("model", "hub_model"), ("dataset", "hub_dataset"), ("github", "github")])
def test_files_of_every_source_lie_in_the_hub_folder_as_published(hub, paper, tmp_path, kind, source):
    commit = hub.repo(NAME, kind).commit(FILES)
    found = fetched(with_entries(paper, acme__model=entry(source=source)), tmp_path)
    assert found["revision"] == commit and found["licence"] == "MIT"
    paths = {str(p.relative_to(folder(tmp_path))) for p in folder(tmp_path).rglob("*") if p.is_file()}
    assert paths == {"config.json", "unet/model.safetensors"} == {one["file"] for one in found["files"]}
    for one in found["files"]:
        content = (folder(tmp_path) / one["file"]).read_bytes()
        assert content == FILES[one["file"]]
        assert (one["size"], one["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_huggingface_hub_finds_what_was_fetched_in_its_cache(hub, paper, tmp_path):
    commit = hub.repo(NAME).commit(FILES)
    fetched(with_entries(paper, acme__model=entry()), tmp_path)
    path = hf_hub_download(NAME, "unet/model.safetensors", revision=commit, local_files_only=True)
    with open(path, "rb") as file:
        assert file.read() == BIG


def test_what_huggingface_hub_has_cached_is_not_fetched_again(hub, paper, tmp_path):
    commit = hub.repo(NAME).commit(FILES)
    for name in ("config.json", "unet/model.safetensors"):
        hf_hub_download(NAME, name, revision=commit)
    before = len(hub.downloads())
    fetched(with_entries(paper, acme__model=entry()), tmp_path)
    assert len(hub.downloads()) == before


def test_a_second_fetch_asks_nothing_and_writes_the_same_bytes(hub, paper, tmp_path):
    hub.repo(NAME).commit(FILES)
    config = with_entries(paper, acme__model=entry())
    step = fetch(config, NAME, tmp_path / "results", tmp_path / "hub.lock.json")
    first, asked = step.read_bytes(), len(hub.requests)
    step.unlink()
    fetch(config, NAME, tmp_path / "results", tmp_path / "hub.lock.json")
    assert step.read_bytes() == first and len(hub.requests) == asked


@pytest.mark.parametrize(
    ("variant", "globs", "there", "expected"),
    [
        ("fp16", ["m*.safetensors"], ["m.safetensors", "m.fp16.safetensors"], ["m.fp16.safetensors"]),
        (None, ["m*.safetensors"], ["m.safetensors", "m.fp16.safetensors"], ["m.safetensors"]),
        ("fp16", ["m*.safetensors"], ["m.safetensors"], ["m.safetensors"]),
        ("fp16", ["*"], ["a/m.safetensors", "a/m.fp16.safetensors", "b/m.safetensors", "a/c.json"],
         ["a/c.json", "a/m.fp16.safetensors", "b/m.safetensors"]),
        ("fp16", ["*"], ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.fp16.safetensors"],
         ["m.fp16.safetensors"]),
        (None, ["m*.pt"], ["m_v2.pt", "m_v2.1.pt"], ["m_v2.1.pt", "m_v2.pt"]),
        (None, ["model*.safetensors", "pytorch_model.bin"], ["model.safetensors", "pytorch_model.bin"],
         ["model.safetensors"]),
        (None, ["model*.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"], ["pytorch_model.bin"]),
        (None, ["a/model*.safetensors", "a/pytorch_model.bin"], ["a/model.safetensors", "a/pytorch_model.bin"],
         ["a/model.safetensors"]),
        (None, ["vocab.json", "tokenizer.json"], ["vocab.json"], ["vocab.json"]),
        (None, ["data/*.jpg"], ["data/dog/1.jpg", "data/1.png"], ["data/dog/1.jpg"]),
    ],
)  # fmt: skip
def test_variants_and_alternatives(hub, paper, tmp_path, variant, globs, there, expected):
    hub.repo(NAME).commit({path: path.encode() for path in there})
    found = fetched(with_entries(paper, acme__model=entry(files=globs, variant=variant)), tmp_path)
    assert [one["file"] for one in found["files"]] == expected


@pytest.mark.parametrize(
    ("globs", "named"),
    [(["vocab.json"], "vocab.json"), (["model*.safetensors", "pytorch_model.bin"], "model.*.safetensors"),
     (["config.json", "x/*"], "x/.*")],
)  # fmt: skip
def test_a_glob_that_fits_nothing_is_named(hub, paper, tmp_path, globs, named):
    hub.repo(NAME).commit({"config.json": b"{}"})
    with pytest.raises(
        UserError, match=f"acme/model has no file {globs[-1 if 'x/*' in globs else 0]}".replace("*", ".")
    ):
        fetched(with_entries(paper, acme__model=entry(files=globs)), tmp_path)
    assert_nothing_under_a_final_name(tmp_path)


def test_links_to_files_that_are_not_asked_for_any_more_go_away(hub, paper, tmp_path):
    hub.repo(NAME).commit(FILES)
    fetched(with_entries(paper, acme__model=entry(files=["*"])), tmp_path)
    assert (folder(tmp_path) / "README.md").exists()
    fetched(with_entries(paper, acme__model=entry()), tmp_path)
    assert not (folder(tmp_path) / "README.md").is_symlink() and (folder(tmp_path) / "config.json").exists()


def test_a_mirror_is_fetched_by_the_entry_of_the_original_at_a_commit_of_its_own(hub, paper, tmp_path):
    original = entry(source="hub_dataset", revision="0" * 40, gone="404", mirrors=["copy/model"], licence="CC")
    config = with_entries(paper, acme__model=original)
    commit = hub.repo("copy/model", "dataset").commit(FILES)
    found = fetched(config, tmp_path, "copy/model")
    assert (found["revision"], found["licence"], len(found["files"])) == (commit, "CC", 2)
    assert published_entry(config, NAME) is original
    with pytest.raises(UserError, match="other/model has no entry in repositories.yaml and is nobody's mirror"):
        published_entry(config, "other/model")


def test_a_stand_ins_hub_is_not_overwritten(tmp_path):
    with pytest.raises(UserError, match="scale smoke fetches nothing"):
        fetch(load({"scale": "smoke"}), "tianweiy/DMD2", tmp_path, tmp_path / "hub.lock.json")
    assert not list(tmp_path.iterdir())


# ---- revisions ----


def test_the_newest_commit_is_looked_up_once_and_then_kept(hub, paper, tmp_path, capsys):
    config = with_entries(paper, acme__model=entry())
    first = hub.repo(NAME).commit(FILES)
    assert fetched(config, tmp_path)["revision"] == first
    assert f"newest commit {first} looked up and written" in capsys.readouterr().out
    lock = (tmp_path / "hub.lock.json").read_bytes()
    assert json.loads(lock)[NAME]["revision"] == first and set(json.loads(lock)[NAME]) == {"revision", "looked_up"}
    hub.repo(NAME).commit(FILES | {"config.json": b"newer"})
    assert fetched(config, tmp_path)["revision"] == first
    assert (tmp_path / "hub.lock.json").read_bytes() == lock
    assert (folder(tmp_path) / "config.json").read_bytes() == FILES["config.json"]
    assert not any("/main" in request.path for request in hub.requests)


@pytest.mark.parametrize(("source", "kind"), [("hub_model", "model"), ("github", "github")])
def test_an_entrys_revision_goes_before_the_lock_and_the_newest(hub, paper, tmp_path, source, kind):
    first = hub.repo(NAME, kind).commit(FILES)
    hub.repo(NAME, kind).commit(FILES | {"config.json": b"newer"})
    revision = first[:7] if kind == "github" else first
    write_once(NAME, "f" * 40, tmp_path / "hub.lock.json")
    found = fetched(with_entries(paper, acme__model=entry(source=source, revision=revision)), tmp_path)
    assert found["revision"] == first
    assert (folder(tmp_path) / "config.json").read_bytes() == FILES["config.json"]


def test_of_two_that_look_up_at_once_the_first_holds(tmp_path):
    lock = tmp_path / "hub.lock.json"
    assert write_once("a/b", "1" * 40, lock) == "1" * 40
    assert write_once("a/b", "2" * 40, lock) == "1" * 40
    assert write_once("a/a", "3" * 40, lock) == "3" * 40
    assert read_lock(lock) == {"a/a": "3" * 40, "a/b": "1" * 40}


def test_a_commit_that_another_writes_while_we_ask_holds_for_us(hub, paper, tmp_path, monkeypatch):
    config = with_entries(paper, acme__model=entry())
    first = hub.repo(NAME).commit(FILES)
    hub.repo(NAME).commit(FILES | {"config.json": b"newer"})
    asked = fetching.snapshot_of

    def slowly(repository, lock):
        found = asked(repository, lock)
        write_once(NAME, first, lock)
        return found

    monkeypatch.setattr(fetching, "snapshot_of", slowly)
    assert fetched(config, tmp_path)["revision"] == first == read_lock(tmp_path / "hub.lock.json")[NAME]


@pytest.mark.parametrize("revision", ["main", "v1.0", "", "27A8642"])
def test_a_branch_or_tag_is_no_revision(tmp_path, revision):
    repositories = {"tianweiy/DMD2": {"revision": revision}}
    with pytest.raises(UserError, match=r"^repositories\.tianweiy/DMD2\.revision is .*; expected a commit, 7 to 40"):
        load({"scale": "paper", "repositories": repositories})
    (tmp_path / "hub.lock.json").write_text(json.dumps({"a/b": {"revision": revision}}))
    with pytest.raises(UserError, match="is not a lock file"):
        read_lock(tmp_path / "hub.lock.json")


@pytest.mark.parametrize("text", ["", "[]", '{"a/b": "1"}', '{"a/b": {}}', '{"a/b": {"revision": 1}}'])
def test_a_broken_lock_file_is_a_sentence(tmp_path, text):
    (tmp_path / "hub.lock.json").write_text(text)
    with pytest.raises(UserError, match="is not a lock file"):
        read_lock(tmp_path / "hub.lock.json")


@pytest.mark.parametrize("kind", ["model", "github"])
def test_offline_only_cache_and_lock_are_used(hub, paper, tmp_path, monkeypatch, kind):
    config = with_entries(paper, acme__model=entry(source="github" if kind == "github" else "hub_model"))
    hub.repo(NAME, kind).commit(FILES)
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    with pytest.raises(UserError, match="no revision, neither in repositories.yaml nor in .*HF_HUB_OFFLINE is set"):
        fetched(config, tmp_path)
    monkeypatch.setenv(OFFLINE_VARIABLE, "0")
    online, asked = fetched(config, tmp_path), len(hub.requests)
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched(config, tmp_path) == online and len(hub.requests) == asked


def test_offline_what_huggingface_hub_had_cached_is_enough(hub, paper, tmp_path, monkeypatch):
    commit = hub.repo(NAME).commit(FILES)
    for name in ("config.json", "unet/model.safetensors"):
        hf_hub_download(NAME, name, revision=commit)
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = fetched(with_entries(paper, acme__model=entry(revision=commit)), tmp_path)
    assert len(found["files"]) == 2
    by_its_beginning = with_entries(paper, acme__model=entry(revision=commit[:7]))
    assert fetched(by_its_beginning, tmp_path)["revision"] == commit


@pytest.mark.parametrize("lacking", ["not begun", "half fetched"])
def test_offline_a_file_that_is_not_cached_is_named(hub, paper, tmp_path, monkeypatch, lacking):
    """Neither a wrong entry nor a cache that cannot be written."""
    commit = hub.repo(NAME).commit(FILES)
    config = with_entries(paper, acme__model=entry(revision=commit))
    if lacking == "not begun":
        hf_hub_download(NAME, "config.json", revision=commit)
    else:
        hub.repo(NAME).faults[MODEL] = Fault(cut_after=70_000)
        with pytest.raises(UserError, match="ends after 70000"):
            fetched(config, tmp_path)
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Refusal, match=r"^unet/.*safetensors of acme/model is not in the cache and HF_HUB_OFFLINE") as e:
        fetched(config, tmp_path)
    assert e.value.state == "offline: not cached"
    assert_nothing_under_a_final_name(tmp_path)


def test_a_damaged_list_of_files_is_asked_for_anew(hub, paper, tmp_path):
    commit = hub.repo(NAME).commit(FILES)
    config = with_entries(paper, acme__model=entry(revision=commit))
    first = fetched(config, tmp_path)
    (note,) = (tmp_path / "home/assets").rglob(f"{commit}.json")
    note.write_text(note.read_text()[:-10])
    assert fetched(config, tmp_path) == first and json.loads(note.read_text())


@pytest.mark.parametrize(
    ("said", "offline"),
    [({}, "0"), ({"HF_HUB_OFFLINE": "1"}, "1"), ({"HF_HUB_OFFLINE": "0"}, "0"), ({"TRANSFORMERS_OFFLINE": "YES"}, "1")],
)
def test_jobs_are_offline_and_remember_what_the_user_had_said(monkeypatch, said, offline):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", OFFLINE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    first = job_environment({})
    assert (first["HF_HUB_OFFLINE"], first[OFFLINE_VARIABLE]) == ("1", offline)
    for name in ("HF_HUB_OFFLINE", OFFLINE_VARIABLE):  # Snakemake reads the Snakefile again in each job
        monkeypatch.setenv(name, first[name])
    assert job_environment({})[OFFLINE_VARIABLE] == offline


# ---- faults ----

MODEL = "unet/model.safetensors"
FAULTS = {  # where and what, words of the sentence
    "gated": (MODEL, GATED, ["gated", "accept its terms at https://huggingface.co/acme/model", "set HF_TOKEN"]),
    "gated, no token": (MODEL, GATED_401, ["gated", "set HF_TOKEN"]),
    "forbidden": (API, Fault(403), ["gated", "403"]),
    "unknown": (API, UNKNOWN, ["answers 401", "gone, renamed or private", "no copy is known"]),
    "not found": (API, NOT_FOUND, ["answers 404", "gone, renamed or private"]),
    "file not found": (MODEL, Fault(404, {"X-Error-Code": "EntryNotFound"}), ["not there at that commit", "404"]),
    "busy": (API, Fault(429), ["429", "too many requests", "HF_TOKEN"]),
    "busy with a file": (MODEL, Fault(429), ["429", "too many requests", MODEL]),
    "broken": (API, Fault(503), ["answers 503", "later"]),
    "broken file": (MODEL, Fault(500), ["answers 500", MODEL]),
    "cut": (MODEL, Fault(cut_after=70_000), ["ends after 70000 of 1048576 bytes"]),
    "truncated": (MODEL, Fault(short=70_000), ["of 1048576 bytes", "truncated"]),
    "other bytes": (MODEL, Fault(content=BIG[::-1]), ["has hash", "expected", "removed"]),
    "other small file": ("config.json", Fault(content=b'{"a": 2}'), ["config.json", "has hash", "removed"]),
    "too long": (MODEL, Fault(content=BIG + b"x"), ["1048577 bytes; expected 1048576"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_every_fault_is_one_sentence_and_leaves_nothing_half_written(hub, paper, tmp_path, case):
    where, fault, words = FAULTS[case]
    hub.repo(NAME).commit(FILES)
    hub.repo(NAME).faults[where] = Fault(**vars(fault))
    with pytest.raises(UserError) as error:
        fetched(with_entries(paper, acme__model=entry()), tmp_path)
    sentence = str(error.value)
    assert all(word in sentence for word in [NAME, *words]), sentence
    assert "\n" not in sentence and "Traceback" not in sentence and str(tmp_path) not in sentence
    assert_nothing_under_a_final_name(tmp_path)


@pytest.mark.parametrize("case", ["other bytes", "too long", "other small file"])
def test_wrong_bytes_are_not_taken_for_a_beginning(hub, paper, tmp_path, case):
    where, fault, _ = FAULTS[case]
    hub.repo(NAME).commit(FILES)
    hub.repo(NAME).faults[where] = Fault(
        **vars(fault),
    )
    config = with_entries(paper, acme__model=entry())
    with pytest.raises(UserError):
        fetched(config, tmp_path)
    assert not list((tmp_path / "home").rglob(f"{blob_name(where)}.part"))
    hub.repo(NAME).faults.clear()
    assert len(fetched(config, tmp_path)["files"]) == 2


def blob_name(path) -> str:
    content = FILES[path]
    return hashlib.sha256(content).hexdigest() if path == MODEL else git_sha1(content)


GITHUB_FAULTS = {
    "not found": (API, Fault(404), ["answers 404", "gone or renamed"]),
    "rate limit": (API, Fault(403, {"X-RateLimit-Remaining": "0"}), ["403", "too many requests", "GITHUB_TOKEN"]),
    "broken file": (MODEL, Fault(503), ["answers 503"]),
    "cut": (MODEL, Fault(cut_after=1), ["ends after 1 of 1048576 bytes"]),
    "other bytes": (MODEL, Fault(content=BIG[::-1]), ["has hash", "removed"]),
}


@pytest.mark.parametrize("case", GITHUB_FAULTS)
def test_every_fault_of_github_is_one_sentence(hub, paper, tmp_path, case):
    where, fault, words = GITHUB_FAULTS[case]
    hub.repo(NAME, "github").commit(FILES)
    hub.repo(NAME, "github").faults[where] = Fault(**vars(fault))
    with pytest.raises(UserError) as error:
        fetched(with_entries(paper, acme__model=entry(source="github")), tmp_path)
    assert all(word in str(error.value) for word in [NAME, *words]), str(error.value)
    assert_nothing_under_a_final_name(tmp_path)


def test_without_a_network_it_says_so(hub, paper, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="acme/model: no answer from 127.0.0.1 .*HF_HUB_OFFLINE=1"):
        fetched(with_entries(paper, acme__model=entry()), tmp_path)
    assert hub.waits == [1, 2, 4, 8, 16]


def test_what_is_gone_names_why_its_copies_and_the_setting(hub, paper, tmp_path):
    with pytest.raises(UserError) as error:
        fetched(paper, tmp_path, "yuvalkirstain/pickapic_v2")
    sentence = str(error.value)
    assert "404 since 2025-04-30" in sentence
    setting = "datasets={pickapic_v2: {repo: liuhuohuo2/pick-a-pic-v2}}"
    assert sentence.endswith(f"add --config scale=paper '{setting}'.")
    assert not any("liuhuohuo2" in request.path for request in hub.requests)  # never taken silently


def test_a_replacement_is_what_settings_take(paper):
    import yaml

    settings = replacement(paper, "tianweiy/DMD2", "copy/DMD2")
    assert [one.partition("=")[0] for one in settings] == ["models"]
    overrides = {kind: yaml.safe_load(value) for kind, _, value in (one.partition("=") for one in settings)}
    changed = load({"scale": "paper", "repositories": {"tianweiy/DMD2": {"mirrors": ["copy/DMD2"]}}, **overrides})
    assert "tianweiy/DMD2" not in str(changed.models) and "copy/DMD2" in str(changed.models)
    back = str(changed.models).replace("copy/DMD2", "tianweiy/DMD2")
    assert back == str(paper.models)


def test_a_replacement_leaves_a_folder_of_ones_own_where_it_is():
    loras = [{"repo": repo, "file": "w"} for repo in ("tianweiy/DMD2", "../mine/lora")]
    config = load({"scale": "paper", "models": {"sdxl_turbo": {"loras": loras}}})
    assert any("{repo: ../mine/lora, file: w" in one for one in replacement(config, "tianweiy/DMD2", "copy/DMD2"))


def test_an_entry_that_is_back_is_fetched(hub, paper, tmp_path):
    hub.repo(NAME).commit(FILES)
    config = with_entries(paper, acme__model=entry(gone="404 since long ago", mirrors=["copy/model"]))
    assert len(fetched(config, tmp_path)["files"]) == 2


def test_another_sha256_than_the_entrys_is_refused_and_removed(hub, paper, tmp_path):
    hub.repo(NAME).commit(FILES)
    config = with_entries(paper, acme__model=entry(sha256={"config.json": "0" * 64}))
    with pytest.raises(UserError, match="config.json of acme/model has sha256 .*repositories.acme/model.sha256 names"):
        fetched(config, tmp_path)
    assert_nothing_under_a_final_name(tmp_path)
    right = hashlib.sha256(FILES["config.json"]).hexdigest()
    fetched(with_entries(paper, acme__model=entry(sha256={"config.json": right})), tmp_path)


@pytest.mark.parametrize("path", ["config.json", MODEL])
def test_a_cached_file_that_changed_is_noticed_removed_and_fetched_anew(hub, paper, tmp_path, path):
    hub.repo(NAME).commit(FILES)
    config = with_entries(paper, acme__model=entry())
    fetched(config, tmp_path)
    place = (folder(tmp_path) / path).resolve()
    place.write_bytes(FILES[path][::-1])
    with pytest.raises(UserError, match="has hash .* removed"):
        fetched(config, tmp_path)
    assert not place.exists()
    fetched(config, tmp_path)
    assert (folder(tmp_path) / path).read_bytes() == FILES[path]


def test_a_file_that_changed_at_the_same_commit_is_noticed(hub, paper, tmp_path):
    commit = hub.repo(NAME).commit(dict(FILES))
    config = with_entries(paper, acme__model=entry())
    fetched(config, tmp_path)
    hub.repo(NAME).commits[commit]["config.json"] = b'{"a": 3}'
    (folder(tmp_path) / "config.json").resolve().unlink()  # the cache was emptied; what the commit held is still known
    with pytest.raises(UserError, match="config.json of acme/model has hash"):
        fetched(config, tmp_path)


# ---- again and again ----


@pytest.mark.parametrize("where", [API, MODEL])
def test_a_busy_server_is_asked_again_after_longer_and_longer(hub, paper, tmp_path, where):
    hub.repo(NAME).commit(FILES)
    hub.repo(NAME).faults[where] = Fault(503, times=4)
    assert len(fetched(with_entries(paper, acme__model=entry()), tmp_path)["files"]) == 2
    assert hub.waits == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("headers", "wait"),
    [({"Retry-After": "7"}, 7), ({"RateLimit": '"api";r=0;t=21'}, 21), ({}, 1),
     ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0), ({"Retry-After": "soon"}, 1)],
)  # fmt: skip
def test_as_long_as_the_server_asks(hub, paper, tmp_path, headers, wait):
    hub.repo(NAME).commit(FILES)
    hub.repo(NAME).faults[API] = Fault(429, headers, times=1)
    fetched(with_entries(paper, acme__model=entry()), tmp_path)
    assert hub.waits == [wait]


def test_a_server_that_asks_for_hours_is_left_alone(hub, paper, tmp_path):
    hub.repo(NAME).commit(FILES)
    hub.repo(NAME).faults[API] = Fault(429, {"Retry-After": "7200"}, times=1)
    with pytest.raises(UserError, match="too many requests"):
        fetched(with_entries(paper, acme__model=entry()), tmp_path)
    assert hub.waits == []


def test_a_missing_repository_is_asked_for_once(hub, paper, tmp_path):
    with pytest.raises(UserError):
        fetched(with_entries(paper, acme__model=entry()), tmp_path)
    assert len(hub.requests) == 1 and hub.waits == []


@pytest.mark.parametrize("kind", ["model", "github"])
def test_a_cut_connection_goes_on_where_it_was_cut(hub, paper, tmp_path, kind):
    hub.repo(NAME, kind).commit(FILES)
    hub.repo(NAME, kind).faults[MODEL] = Fault(cut_after=300_000, times=1)
    source = "github" if kind == "github" else "hub_model"
    fetched(with_entries(paper, acme__model=entry(source=source)), tmp_path)
    starts = [r.start for r in hub.downloads() if r.path.endswith(MODEL)]
    assert starts == [None, 300_000]
    assert (folder(tmp_path) / MODEL).read_bytes() == BIG


def test_a_beginning_of_something_else_ends_in_a_sentence_and_then_right(hub, paper, tmp_path):
    commit = hub.repo(NAME).commit(FILES)
    part = tmp_path / "home/hub/models--acme--model/blobs" / f"{hashlib.sha256(BIG).hexdigest()}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"wrong" * 1000)
    config = with_entries(paper, acme__model=entry(revision=commit))
    with pytest.raises(UserError, match="has hash"):
        fetched(config, tmp_path)
    fetched(config, tmp_path)
    assert (folder(tmp_path) / MODEL).read_bytes() == BIG


def test_a_full_disk_is_foreseen(hub, paper, tmp_path, monkeypatch):
    hub.repo(NAME).commit(FILES)
    monkeypatch.setattr("pso.download.free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match="acme/model needs 0.0 GB more .* make room, or set HF_HOME"):
        fetched(with_entries(paper, acme__model=entry()), tmp_path)
    assert hub.downloads() == []


def test_a_disk_that_fills_up_keeps_the_beginning(hub, paper, tmp_path, monkeypatch):
    from pso import download

    hub.repo(NAME).commit(FILES)
    real = download._Download.write

    def full(self, answer, out):
        if self.file.path != MODEL:
            return real(self, answer, out)
        out.write(BIG[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download._Download, "write", full)
    config = with_entries(paper, acme__model=entry())
    with pytest.raises(UserError, match="could not write unet/model.safetensors .*No space left on device; make room"):
        fetched(config, tmp_path)
    assert_nothing_under_a_final_name(tmp_path)
    monkeypatch.undo()


# ---- as a command ----


def settings(**repositories) -> str:
    return json.dumps({"scale": "paper", "repositories": {n.replace("__", "/"): r for n, r in repositories.items()}})


def command(name=NAME, **fields) -> list[str]:
    given = settings(acme__model=entry(**fields).model_dump(mode="json"))
    return [sys.executable, "-m", "pso.fetch", "--set", given, "--repo", name]


@pytest.fixture
def served(tmp_path):
    with FakeHub() as found:
        yield found


def test_the_command_says_the_licence_first_and_one_sentence_last(served, tmp_path):
    served.repo(NAME).commit(FILES)
    served.repo(NAME).faults[MODEL] = GATED
    done = run(*command(non_commercial=True), cwd=tmp_path, **served.environment(tmp_path / "home"), HF_TOKEN=TOKEN)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("fetch: unet/model.safetensors of acme/model is gated") and done.stderr.count("\n") == 1
    )
    assert done.stdout.splitlines()[1].startswith("acme/model: NON-COMMERCIAL USE ONLY")
    assert not (tmp_path / "results").exists()


def test_a_token_goes_to_the_hub_and_nowhere_else(served, tmp_path):
    served.repo(NAME).commit(FILES)
    environment = served.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN}
    done = run(*command(), cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert {r.authorization for r in served.downloads()} == {f"Bearer {TOKEN}"}
    elsewhere = [r for r in served.requests if r.path.startswith("/cdn/")]
    assert elsewhere and all(r.authorization is None and r.host.startswith("localhost") for r in elsewhere)
    assert TOKEN not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_a_line_end_is_no_part_of_githubs_token(hub, paper, tmp_path, monkeypatch):
    hub.repo(NAME, "github").commit(FILES)
    monkeypatch.setenv("GITHUB_TOKEN", f"{TOKEN}\n")
    fetched(with_entries(paper, acme__model=entry(source="github")), tmp_path)
    assert f"Bearer {TOKEN}" in {r.authorization for r in hub.requests}


def test_an_invalid_token_is_named_and_not_shown(served, tmp_path):
    served.repo(NAME).commit(FILES)
    served.repo(NAME).faults[API] = BAD_TOKEN
    done = run(*command(), cwd=tmp_path, **served.environment(tmp_path / "home"), HF_TOKEN=TOKEN)
    assert done.returncode == 1 and "the token in HF_TOKEN, or in the token file, is not valid" in done.stderr
    assert TOKEN not in done.stdout + done.stderr and done.stderr.count("\n") == 1


def test_a_killed_download_goes_on(served, tmp_path):
    size = 16 * len(BIG)
    files = FILES | {MODEL: BIG * 16}
    served.repo(NAME).commit(files)
    served.repo(NAME).faults[MODEL] = Fault(pause=0.02, times=1)
    environment = {**os.environ, **served.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command(), cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    parts = tmp_path / "home/hub/models--acme--model/blobs"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, StopIteration):
            if next(parts.glob(f"{hashlib.sha256(files[MODEL]).hexdigest()}.part")).stat().st_size > 2 * len(BIG):
                break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    part = next(parts.glob("*.part"))
    kept = part.stat().st_size
    assert 0 < kept < size
    assert_nothing_under_a_final_name(tmp_path)
    done = run(*command(), cwd=tmp_path, **served.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert [r.start for r in served.downloads() if r.path.endswith(MODEL)] == [None, kept]
    assert (folder(tmp_path) / MODEL).read_bytes() == files[MODEL]
    assert "goes on after" in done.stdout and not list(parts.glob("*.part"))


def test_a_server_that_is_no_hub_is_a_sentence(served, tmp_path, hub, paper, monkeypatch):
    monkeypatch.setattr(remote.Repository, "_of_hub", lambda *_: json.loads("<html>"))
    with pytest.raises(UserError, match="gave no answer of a repository"):
        fetched(with_entries(paper, acme__model=entry()), tmp_path)


def test_what_passes_and_what_does_not():
    assert remote.passing(httpx2.ConnectError("")) and remote.passing(httpx2.ReadTimeout(""))
    assert not remote.passing(httpx2.UnsupportedProtocol("")) and not remote.passing(ValueError())


def test_the_rule_gives_the_sentence_and_then_the_files(served, tmp_path):
    """Of a job of the workflow, whose HF_HUB_OFFLINE is not the user's."""
    vae = "madebyollin/sdxl-vae-fp16-fix"
    served.repo(vae).commit({"config.json": b"{}", "diffusion_pytorch_model.safetensors": BIG})
    served.repo(vae).faults["config.json"] = GATED
    step = "results/paper/hub/repositories/madebyollin--sdxl-vae-fp16-fix.json"
    environment = served.environment(tmp_path / "home")
    done = snakemake(step, cwd=tmp_path, scale="paper", **environment)
    log = (tmp_path / "results/paper/logs/fetch-madebyollin--sdxl-vae-fp16-fix.log").read_text()
    assert done.returncode != 0 and log.splitlines()[-1].startswith(f"fetch: config.json of {vae} is gated")
    assert "Traceback" not in log and not (tmp_path / step).exists() and not folder(tmp_path, vae).exists()
    served.repo(vae).faults.clear()
    assert snakemake(step, cwd=tmp_path, scale="paper", **environment).returncode == 0
    assert json.loads((tmp_path / step).read_text())["revision"] == read_lock(tmp_path / "hub.lock.json")[vae]
    assert (folder(tmp_path, vae) / "diffusion_pytorch_model.safetensors").read_bytes() == BIG
