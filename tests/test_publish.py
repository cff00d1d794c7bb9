"""Publishing: what is shown is what is sent, byte for byte, and nothing is sent, or asked, unless it is said twice."""

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cards import RUN, folder_of, write_run, write_tables
from conftest import ROOT
from push_hub import PushHub
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save

from pso import leaks as leaks_module
from pso.campaign import Run
from pso.card import text_of, write
from pso.config import load
from pso.leaks import leaks
from pso.paths import LORA_FILE, card_file
from pso.provenance import UserError
from pso.publish import LOG_BYTES, plan, run_of

REPO, TOKEN = "somebody/sdxl-dmd2-offline-pso", "hf_" + "x" * 30
FILES = [LORA_FILE, "README.md", "run.json", "config.yaml", "train.jsonl"]


@pytest.fixture(scope="module")
def paper():
    return load({"scale": "paper"})


@pytest.fixture
def results(tmp_path, paper) -> Path:
    """A results folder with one finished run, its card and the tables."""
    found = tmp_path / "results"
    folder = write_run(paper, found)
    write_tables(paper, found)
    card_file(folder).write_text(text_of(paper, RUN, found))
    return found


@pytest.fixture
def hub():
    with PushHub() as found:
        yield found


IMPATIENT = "import time; time.sleep = lambda _: None; from pso.publish import main; main()"  # tries again at once


def publish(
    hub: PushHub,
    results: Path,
    *arguments: str,
    token: str | None = TOKEN,
    endpoint: str | None = None,
    xet: bool = False,
    start: tuple[str, str] = ("-m", "pso.publish"),
):
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint or hub.url, "HF_HOME": str(results.parent / "home"), "NO_PROXY": "*"}
    environment |= {"HF_HUB_DISABLE_XET": "0" if xet else "1", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_TOKEN": token} if token else {}
    environment |= {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_MAX_DURATION": "1s"}
    run = Path(results.name) / "paper/preference/sdxl_dmd2/pso_offline/seed0"
    command = [sys.executable, *start, str(run), *arguments]
    done = subprocess.run(command, cwd=results.parent, env=environment, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def listed(output: str) -> dict[str, tuple[int, str]]:
    """Path -> bytes and sha256 of a printed list."""
    found = re.findall(r"^(\S+) +([\d,]+) +([0-9a-f]{64}) +\S+$", output, re.MULTILINE)
    return {path: (int(size.replace(",", "")), sha256) for path, size, sha256 in found}


# ---- shown, and sent ----


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("--repo-id", REPO), ("--repo-id", REPO, "--dry-run")])
def test_without_push_no_server_is_asked(hub, results, arguments):
    done = publish(hub, results, *arguments)
    assert done.returncode == 0, done.stderr
    assert hub.requests == []
    assert list(listed(done.stdout)) == FILES
    assert done.stdout.rstrip().endswith("nothing was sent; --push sends it")
    folder = results / "paper/preference/sdxl_dmd2/pso_offline/seed0"
    for path, (size, sha256) in listed(done.stdout).items():
        if path != "README.md":
            content = (folder / ("lora" if path == LORA_FILE else "") / path).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)


def test_what_arrives_is_what_was_listed_byte_for_byte(hub, results):
    dry, sent = publish(hub, results, "--repo-id", REPO), publish(hub, results, "--repo-id", REPO, "--push")
    assert sent.returncode == 0, sent.stderr
    assert listed(sent.stdout) == listed(dry.stdout) and len(hub.commits) == 1 and hub.repos == {REPO: False}
    arrived = hub.files[REPO]
    found = {path: (len(content), hashlib.sha256(content).hexdigest()) for path, content in arrived.items()}
    assert found == listed(dry.stdout)
    card = arrived["README.md"].decode()
    assert f"\n{card}\n" in dry.stdout  # the whole text was shown
    beside = (results / "paper/preference/sdxl_dmd2/pso_offline/seed0/lora/README.md").read_text()
    place = 'load_lora_weights("results/paper/preference/sdxl_dmd2/pso_offline/seed0/lora")'
    assert place in beside and card == beside.replace(place, f'load_lora_weights("{REPO}")')
    assert hub.commits == ["LoRA, card and record of paper/preference/sdxl_dmd2/pso_offline/seed0"]
    assert hub.tokens == {f"Bearer {TOKEN}", None} and sent.stdout.rstrip().endswith(f"/{REPO}/commit/{'1' * 40}")
    assert TOKEN not in sent.stdout + sent.stderr + card


def test_a_gitignore_of_the_repository_keeps_nothing_out(hub, results):
    hub.gitignore = {LORA_FILE, "train.jsonl"}
    done = publish(hub, results, "--repo-id", REPO, "--push")
    assert done.returncode == 0, done.stderr
    found = {path: (len(content), hashlib.sha256(content).hexdigest()) for path, content in hub.files[REPO].items()}
    assert found == listed(done.stdout) and list(found) == FILES


def test_files_that_a_hub_keeps_out_all_the_same_are_named_and_nothing_is_committed(hub, results):
    hub.ignored = {LORA_FILE, "train.jsonl"}
    done = publish(hub, results, "--repo-id", REPO, "--push")
    assert done.returncode == 1 and hub.commits == []
    assert done.stderr.splitlines()[-1].startswith(
        f"publish: the .gitignore of {REPO} keeps out {LORA_FILE}, train.jsonl; take that out of it"
    )


def test_a_folder_of_results_elsewhere_is_nobodys_business(hub, results):
    there = results.rename(results.parent / "mmillers_disk")
    assert publish(hub, there, "--repo-id", REPO, "--push").returncode == 0
    assert hub.commits == ["LoRA, card and record of paper/preference/sdxl_dmd2/pso_offline/seed0"]
    assert not any(b"mmillers_disk" in content for content in hub.files[REPO].values())


def test_a_second_push_is_a_second_commit_and_private_stays_private(hub, results):
    for _ in range(2):
        assert publish(hub, results, "--repo-id", REPO, "--push", "--private").returncode == 0
    assert hub.repos == {REPO: True} and len(hub.commits) == 2
    done = publish(hub, results, "--repo-id", REPO, "--push")
    assert done.returncode == 1 and f"{REPO} is there already and is private, and this push is public" in done.stderr
    assert len(hub.commits) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--push",), "--push needs --repo-id user/name"),
        (("--push", "--dry-run", "--repo-id", REPO), "--push and --dry-run exclude each other"),
        (("--push", "--repo-id", "alone"), "--repo-id is 'alone'; expected user/name"),
        (("--push", "--repo-id", "a b/c"), "--repo-id is 'a b/c'; expected user/name"),
    ],
)
def test_a_push_that_was_not_fully_asked_for_asks_no_server(hub, results, arguments, named):
    done = publish(hub, results, *arguments)
    assert done.returncode == 1 and done.stderr.startswith(f"publish: {named}"), done.stderr
    assert hub.requests == []


@pytest.mark.parametrize(
    ("refuse", "named"),
    [
        ({"repos/create": (401, {"error": "Invalid credentials"})}, "the Hub answers 401: the token is not valid"),
        ({"repos/create": (403, {"error": "Forbidden"})}, f"answers 403: the token may not write to {REPO}"),
        ({"commit/main": (403, {"error": "Forbidden"})}, "answers 403"),
        (
            {"validate-yaml": (400, {"errors": [{"message": "license is wrong"}]})},
            "publish: the Hub refuses the card: ",
        ),
        ({"repos/create": (200, {})}, "the answer is none of a Hub's; is HF_ENDPOINT right?"),
        ({"objects/batch": (413, {"error": "too large"})}, "answers 413: too large"),
        (
            {"/storage/": (403, {"error": "expired"})},
            f"uploading '{LORA_FILE}' to the Hub: the Hub answers 403: expired.",
        ),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence_and_nothing_is_committed(hub, results, refuse, named):
    hub.refuse = refuse
    done = publish(hub, results, "--repo-id", REPO, "--push")
    assert done.returncode == 1 and named in done.stderr.splitlines()[-1], done.stderr
    assert hub.files.get(REPO, {}) == {}


@pytest.mark.parametrize(
    ("hang_up", "named"),
    [
        (
            "/storage/",
            f"Error while uploading '{LORA_FILE}' to the Hub: no answer from the Hub (RemoteProtocolError); is",
        ),
        ("preupload", "publish: no answer from the Hub (RemoteProtocolError); is there a network"),
    ],
)
def test_a_connection_that_is_lost_is_one_sentence_and_nothing_is_committed(hub, results, hang_up, named):
    hub.hang_up = [hang_up]
    done = publish(hub, results, "--repo-id", REPO, "--push", start=("-c", IMPATIENT))
    assert done.returncode == 1 and named in done.stderr.splitlines()[-1], done.stderr
    assert hub.commits == []


@pytest.mark.skipif(find_spec("hf_xet") is None, reason="hf_xet, with which a real Hub is sent to, is not installed")
@pytest.mark.parametrize(
    ("refuse", "hang_up", "named"),
    [
        ({"xet-write-token": (403, {"error": "Forbidden"})}, [], "403 Forbidden"),
        ({"/v1/": (401, {"error": "Unauthorized"})}, [], "401 Unauthorized"),
        ({}, ["/v1/"], "error sending request"),
    ],
)
def test_what_stops_an_upload_by_xet_is_one_sentence(hub, results, refuse, hang_up, named):
    hub.refuse, hub.hang_up = refuse, hang_up
    done = publish(hub, results, "--repo-id", REPO, "--push", xet=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("publish: the upload stopped (") and named in last, done.stderr
    assert f"may the token write to {REPO}? Then push again." in last and hub.commits == []
    assert any("xet-write-token" in path for _, path in hub.requests)


def test_no_token_and_no_network_are_sentences(hub, results):
    done = publish(hub, results, "--repo-id", REPO, "--push", token=None)
    assert done.returncode == 1 and "there is no token of the Hub; `hf auth login` keeps one" in done.stderr
    assert hub.requests == []
    done = publish(hub, results, "--repo-id", REPO, "--push", endpoint="http://127.0.0.1:9")
    assert done.returncode == 1 and "no answer from the Hub (ConnectError)" in done.stderr


# ---- refused ----


def card_text(change):
    def spoil(folder: Path) -> None:
        path = card_file(folder)
        text = path.read_text()
        assert (changed := change(text)) != text
        path.write_text(changed)

    return spoil


def without(name):
    return lambda folder: (folder / name).unlink()


def added(name, text):
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


def lora_bytes(change):
    def spoil(folder: Path) -> None:
        path = folder / "lora" / LORA_FILE
        path.write_bytes(change(path.read_bytes()))

    return spoil


def new_scores(folder: Path) -> None:
    path = folder.parents[3] / "tables/table1.csv"
    path.write_text(re.sub(r"(?m)(Offline-PSO w/ SDXL-DMD2,sdxl_dmd2,pso_offline,)\d", r"\g<1>9", path.read_text()))


def told_in_the_head(content: bytes) -> bytes:
    return save(load_tensors(content), {"base_model": "/" + "home/me/sdxl"})


def pickled(_: bytes) -> bytes:
    return b"\x80\x04}q\x00."


def other_tensor(content: bytes) -> bytes:
    return content.replace(b"to_q.lora_A.weight", b"to_q.whole_.weight")


LEAK = "# x\n\nit lay in /" + "home/me/results\n"
REFUSED = [
    (without("run.json"), r"run\.json is not there, so the run is not finished; `python -m pso\.tune"),
    (without("config.yaml"), r"config\.yaml is not there, so the run is not finished"),
    (without(f"lora/{LORA_FILE}"), r"safetensors is not there, so the run is not finished; `python -m pso\.tune"),
    (without("lora/README.md"), r"README\.md, the model card, is not there; `snakemake --cores 2 cards"),
    (card_text(lambda t: t.replace("license: other\n", "")), r"has license None; expected one of"),
    (card_text(lambda t: re.sub(r"license_link: .*\n", "", t)), r"without license_name and a license_link"),
    (
        card_text(lambda t: t.replace("- tianweiy/DMD2\n", "- runwayml/other\n", 1)),
        r"has base_model \[.*runwayml/other",
    ),
    (
        card_text(lambda t: t.replace("# Offline-PSO", f"{LEAK}# Offline-PSO", 1)),
        r"holds an absolute path, /" + "home/me",
    ),
    (
        card_text(lambda t: t.replace("| updates | 5,000 |", "| updates | 6,000 |")),
        r"does not tell of this LoRA, these settings and these tables",
    ),
    (new_scores, r"does not tell of this LoRA, these settings and these tables"),
    (lora_bytes(lambda b: b[:-2] + b"\x01\x02"), r"does not tell of this LoRA"),
    (lora_bytes(told_in_the_head), r"safetensors holds an absolute path, /" + "home/me/sdxl"),
    (lora_bytes(pickled), r"is not a safetensors file"),
    (lora_bytes(lambda b: b[:-8]), r"has \d+ bytes; expected \d+ by its head"),
    (lora_bytes(lambda b: b + b"more"), r"has \d+ bytes; expected \d+ by its head"),
    (lora_bytes(other_tensor), r"holds a tensor unet.*whole_.weight; expected lora_A and lora_B"),
    (added("config.yaml", "folder: /" + "data/me/x\n"), r"config\.yaml holds an absolute path, /" + "data/me/x"),
    (added("train.jsonl", '{"by": "me@example.org"}\n'), r"train\.jsonl holds a mail address, me@example\.org"),
    (added("config.yaml", f"token: {TOKEN}\n"), r"config\.yaml holds a token, hf_xxx\.\.\., which"),
]


@pytest.mark.parametrize(("spoil", "named"), REFUSED, ids=[str(i) + named[:24] for i, (_, named) in enumerate(REFUSED)])
def test_what_must_not_be_published_is_refused_with_a_reason(results, paper, spoil, named):
    assert plan(paper, RUN, results, REPO, False).files  # as it is, it may
    spoil(folder_of(paper, results))
    with pytest.raises(UserError, match=named):
        plan(paper, RUN, results, REPO, False)


def with_unet(repo: str, model: str = "sdxl_dmd2"):
    loras = [{"repo": repo, "file": "w.safetensors"}]
    return load({"scale": "paper", "models": {model: {"unet": None, "loras": loras}}})


def finished(config, results: Path, run: Run = RUN) -> Path:
    """The folder of a run with its card and tables."""
    folder = write_run(config, results, run)
    write_tables(config, results)
    card_file(folder).write_text(text_of(config, run, results))
    return folder


def test_weights_whose_terms_nobody_can_look_up_are_not_published_and_it_is_said_what_to_do(tmp_path):
    config = with_unet(str(tmp_path / "my_lora"))
    folder = finished(config, tmp_path)
    with pytest.raises(UserError) as error:
        plan(config, RUN, tmp_path, REPO, False)
    assert str(error.value).startswith(f"{folder} was trained on ./my_lora, a folder of your own, whose terms nobody")
    assert "name that in models.sdxl_dmd2 and, with its licence, in repositories.yaml" in str(error.value)


def test_weights_of_ones_own_below_stricter_terms_are_published_by_name(tmp_path):
    run = Run("preference", "sdxl_turbo", "pso_offline", 0)
    config = with_unet(str(tmp_path / "my_lora"), run.model)
    finished(config, tmp_path, run)
    made = plan(config, run, tmp_path, REPO, False)
    assert not any(str(tmp_path).encode() in file.content for file in made.files)
    assert 'load_lora_weights("./my_lora"' in made.card and "base_model: stabilityai/sdxl-turbo\n" in made.card


@pytest.mark.parametrize("run", [Run("preference", "sdxl_dmd2", "pso_offline", 3), Run("published", "sdxl", "sft", 0)])
def test_of_a_run_that_no_table_shows_the_command_of_its_own_card_is_named(tmp_path, paper, run):
    folder = write_run(paper, tmp_path, run)
    with pytest.raises(UserError, match=f"is not there; `python -m pso.card --run {folder}` writes it"):
        plan(paper, run, tmp_path, None, False)
    assert write(paper, tmp_path, run) == [card_file(folder)]
    assert [file.path for file in plan(paper, run, tmp_path, None, False).files] == FILES


def test_a_run_may_be_published_before_its_tables_are_made(tmp_path, paper):
    write_run(paper, tmp_path)
    write(paper, tmp_path, RUN)
    assert "Not made yet, though they show it: table1." in plan(paper, RUN, tmp_path, REPO, False).card
    write_tables(paper, tmp_path)
    with pytest.raises(UserError, match="does not tell of this LoRA, these settings and these tables"):
        plan(paper, RUN, tmp_path, REPO, False)


def test_a_card_made_with_other_settings_is_stale_and_accepted_with_them(results, paper):
    with pytest.raises(UserError, match="give them here by --set"):
        plan(load({"scale": "paper", "tables": ["table2"]}), RUN, results, REPO, False)


# ---- notes ----


def test_what_restricts_and_what_is_left_out_is_said(results, paper):
    folder = folder_of(paper, results)
    (folder / "lora" / "other.bin").write_bytes(b"1")
    (folder / "train.jsonl").write_text("x" * (LOG_BYTES + 1))
    made = plan(paper, RUN, results, REPO, False)
    assert [file.path for file in made.files] == FILES[:-1]
    assert made.notes == [
        "licence other, creativeml-open-rail++-m-and-cc-by-nc-4.0-family, https://huggingface.co/tianweiy/DMD2",
        "NON-COMMERCIAL by tianweiy/DMD2 (CC BY-NC 4.0 family)",
        "left out: train.jsonl (5,000,001 bytes, more than 5,000,000)",
        "left out: lora/other.bin",
    ]


def test_a_toy_is_called_one(tmp_path):
    config = load({"scale": "smoke"})
    folder = write_run(config, tmp_path)
    write_tables(config, tmp_path)
    card_file(folder).write_text(text_of(config, RUN, tmp_path))
    assert any(note.startswith("scale smoke: It was trained on stand-ins") for note in
               plan(config, RUN, tmp_path, None, False).notes)  # fmt: skip


# ---- a run's folder ----


def test_a_run_is_told_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scales = ["smoke", "paper"]
    assert run_of(Path("results/paper/preference/sdxl/sft/seed3"), scales) == (
        "paper",
        Run("preference", "sdxl", "sft", 3),
        Path("results"),
    )
    (tmp_path / "a/smoke/concept/cat/sdxl/pso/seed0").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/smoke/concept/cat/sdxl/pso/seed0")
    scale, run, results = run_of(Path("."), scales)
    assert (scale, run, results.resolve()) == ("smoke", Run("concept/cat", "sdxl", "pso", 0), tmp_path / "a")
    for wrong in ("results/paper/preference/sdxl/sft", "results/none/preference/sdxl/sft/seed0", "seed0"):
        with pytest.raises(UserError, match="expected the folder of a run, results/"):
            run_of(Path(wrong), scales)


# ---- leaks ----


@pytest.mark.parametrize(
    "text",
    [
        "see https://huggingface.co/tianweiy/DMD2 and results/{scale}/tables/x.csv",
        "spo_training_and_inference/assets/prompts/4k.json, and/or 1/2, N/A",
        "[x](https://github.com/a/b) `pso/card.py` (eval/reference/table1.csv)",
        "sha256 " + "ab" * 32,
        json.dumps({"files": "data/train-*.parquet", "a": "a - /b"}),
        json.dumps({"code": {"commit": "0a" * 20}, "revision": "f1" * 20, "sha256": "ab" * 32, "num_tokens": 77}),
        json.dumps({"file": "results/paper/style/a/b/seed0/lora/w.bin", "rate": "12 pictures/s", "kl": "1e-05/step"}),
        "license_link: https://huggingface.co/a/b\nbase_model:\n- a/b\n- ./my_unet\n",
        "about ~12/s, -1/2, a//b, 3:1/2; s3://bucket/a/b and https://x.org:8080/a/b",
        "see ../results/README.md: it is a token/key of `x: y`",
    ],
)
def test_what_a_card_says_is_no_leak(text):
    assert leaks(text) == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('"/' + 'home/me/x"', "an absolute path"),
        ("- /" + "mnt/data/x", "an absolute path"),
        ("(/" + "scratch/me/)", "an absolute path"),
        ("~/" + "models/x", "a path of a home"),
        ("C:\\" + "Users\\me", "a path of a home"),
        ("C:" + "/Users", "a path of a home"),
        ("nas01:/" + "export/me/x", "an absolute path"),
        ("disk:/" + "home/me/x", "an absolute path"),
        ("gcc -I/" + "home/me/x", "an absolute path"),
        ("//nas" + "/share/me", "an absolute path"),
        ("\\\\nas" + "\\share\\me", "a path of a network"),
        ("../../" + "home/me/x", "a path out of the folder"),
        ("../" + "home/me/x", "a path out of the folder"),
        ("http://me:pw@" + "host/x", "an address with an account, http://...@"),
        ("https://me:pw@" + "host.org/x", "an address with an account, https://...@"),
        ("WANDB_API_KEY=" + "0a" * 20, "a token, 0a0a0a..."),
        ("file://x", "a path of a home"),
        ("write to me@example.org", "a mail address"),
        ("token: hf_" + "a" * 30, "a token"),
        ("ghp_" + "a" * 36, "a token"),
    ],
)
def test_every_kind_of_leak_is_seen(text, named):
    assert leaks(text) and leaks(text)[0].startswith(named)


SAID = "error:\n/" + "home/me/x"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"a": SAID}),
        json.dumps({"a": [{"b": SAID.replace("\n", "\t")}]}),
        json.dumps({SAID: 1}),
        json.dumps({"a": json.dumps({"b": SAID})}),
        '{"a": "x", ' + json.dumps({"a": SAID})[1:-1] + ', "a": "y"}',  # a reader would keep the last alone
        json.dumps({"a": 1}) + "\n" + json.dumps({"b": SAID}) + "\n",
        "a: 1\nb: " + json.dumps(SAID) + "  # YAML\n",
        "---\nname: " + json.dumps(SAID) + "\n---\n\n# A card\n",
    ],
    ids=["JSON", "tab", "key", "JSON in JSON", "twice", "JSONL", "YAML", "card"],
)
def test_what_stands_behind_an_escape_is_seen(text):
    assert SAID not in text and leaks(text) == ["an absolute path, /" + "home/me/x"]


def test_what_is_beside_the_texts_of_a_file_is_seen():
    assert leaks("a: 1  # of /" + "home/me/x\n") and leaks('{"a": 1}\n{"b": "/' + "home/me")  # a line that is cut off
    assert leaks(json.dumps({"wandb": {"api_key": "0a" * 20}})) == ["a token, 0a0a0a..."]
    assert leaks(json.dumps({"share": "\\\\nas\\share"})) == ["a path of a network, \\\\nas\\share"]


def test_the_short_name_of_the_host_is_seen(monkeypatch):
    monkeypatch.setattr(leaks_module.platform, "node", lambda: "gpu7.cluster.example.edu")
    assert leaks("on gpu7") == ["this machine's name, gpu7"] and leaks("gpu77, 7") == []
    for nobody in ("10.0.0.5", "localhost.localdomain", "gpu.example.edu"):
        monkeypatch.setattr(leaks_module.platform, "node", lambda name=nobody: name)
        assert leaks("10 pictures on a gpu of localhost") == []


def test_secrets_of_the_environment_are_seen_word_for_word_and_not_repeated(monkeypatch):
    for name in ("WANDB_API_KEY", "My_Secret", "SOME_TOKEN"):
        monkeypatch.setenv(name, "5ec3e7" * 3)
        said = leaks(json.dumps({"a": "by " + "5ec3e7" * 3}))
        assert said == [f"the value of {name}, a variable of this environment"]
        monkeypatch.setenv(name, "short")
        assert leaks("short") == []
        monkeypatch.delenv(name)
    monkeypatch.setenv("KEY_OF_DATA", "preference")  # a word of every record
    assert leaks("task: preference") == []


def test_host_account_and_the_token_of_the_login_are_seen(monkeypatch):
    monkeypatch.setattr(leaks_module.platform, "node", lambda: "node7")
    monkeypatch.setattr(leaks_module.getpass, "getuser", lambda: "mmiller")
    monkeypatch.setattr(leaks_module, "get_token", lambda: "secret")
    text = "made on node7 by mmiller with secret"
    assert [leak.partition(",")[0] for leak in leaks(text)] == [
        "the token of the Hub that is logged in here",
        "this machine's name",
        "the name of this account",
    ]
    assert leaks("node77 and mmillers") == []
    monkeypatch.setattr(leaks_module.getpass, "getuser", lambda: "root")  # says nothing of anybody
    assert leaks("root of the tree") == []
    monkeypatch.setattr(leaks_module.getpass, "getuser", lambda: "data")  # a word of every record
    assert leaks("data: pickapic_v2") == [] and leaks("read from /srv/data/x") != []


def test_the_repositorys_own_id_is_no_leak_of_an_account(results, paper, monkeypatch):
    monkeypatch.setattr(leaks_module.getpass, "getuser", lambda: "somebody")
    assert REPO in plan(paper, RUN, results, REPO, False).card


def test_a_run_made_by_the_workflow_may_be_published(smoke):
    config, results = load({"scale": "smoke"}), smoke / "results"
    made = plan(config, RUN, results, REPO, False)
    assert [file.path for file in made.files] == FILES
