"""The doctor on a fake hub: every state, the verdict, and that it fetches nothing."""

import json
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import run, snakemake
from fake_hub import API, GATED, UNKNOWN, FakeHub, Fault, set_process
from huggingface_hub import constants

import pso
from pso import doctor, machine
from pso.config import OFFLINE_VARIABLE, load
from pso.fetch import fetch
from pso.lockfile import LOCK, read_lock
from pso.steps import needed

PICKSCORE, VAE, TURBO = "yuvalkirstain/PickScore_v1", "madebyollin/sdxl-vae-fp16-fix", "stabilityai/sdxl-turbo"
PAIRS = "yuvalkirstain/pickapic_v2"
TOKEN = "hf_secretsecretsecret"


@pytest.fixture(scope="module")
def paper():
    """Its tables, with files of which no sha256 is known beforehand."""
    config = load({"scale": "paper"})
    unpinned = {name: e.model_copy(update={"sha256": {}}) for name, e in config.repositories.items()}
    return config.model_copy(update={"repositories": unpinned})


@pytest.fixture
def hub(monkeypatch, tmp_path, paper):
    """Everything that the paper's tables need, in files of a few bytes."""
    with FakeHub() as found:
        set_process(monkeypatch, found, tmp_path / "home")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(doctor, "from_arguments", lambda args: paper)
        monkeypatch.setattr(machine, "free_bytes", lambda folder: 2 * 10**12)
        for name in needed(paper):
            publish(found, paper, name)
        yield found


def repository(hub, paper, name):
    return hub.repo(
        name, {"hub_model": "model", "hub_dataset": "dataset"}.get(paper.repositories[name].source, "github")
    )


def publish(hub, paper, name):
    entry = paper.repositories[name]
    commit = None if entry.revision is None else entry.revision.ljust(40, "0")
    paths = [glob.replace("*", "x") for glob in entry.files]
    repository(hub, paper, name).commit({path: path.encode() for path in paths}, commit)


def examined(capsys, monkeypatch, *arguments):
    """Exit code and what is printed."""
    monkeypatch.setattr(sys, "argv", ["doctor", "--gpu-elsewhere", *arguments])
    with pytest.raises(SystemExit) as end:
        doctor.main()
    return end.value.code, capsys.readouterr().out


def line(output, name):
    return next(one for one in output.splitlines() if one.startswith(f"{name} "))


def test_all_reachable_is_go_and_nothing_is_fetched(hub, paper, capsys, monkeypatch, tmp_path):
    code, output = examined(capsys, monkeypatch)
    assert code == 0 and output.splitlines()[-1] == "GO: scale paper can start"
    for name in needed(paper):
        assert " reachable " in line(output, name)
    assert hub.downloads() == [] and not (tmp_path / LOCK).exists() and not (tmp_path / "results").exists()
    assert sum("NON-COMMERCIAL" in one for one in output.splitlines()) == 2
    assert "NON-COMMERCIAL" in line(output, TURBO) and "model sdxl_turbo" in line(output, TURBO)
    assert "would be looked up" in line(output, VAE) and "pinned 4f887af" in line(output, "google/dreambooth")


@pytest.mark.parametrize(
    ("fault", "state", "words"),
    [
        (GATED, "gated", f"accept its terms at https://huggingface.co/{PICKSCORE}"),
        (UNKNOWN, "gone", "gone, renamed or private"),
        (Fault(503), "unreachable", "answers 503"),
        (Fault(429), "unreachable", "too many requests"),
    ],
)
def test_one_that_does_not_answer_is_no_go(hub, paper, capsys, monkeypatch, fault, state, words):
    hub.repo(PICKSCORE).faults[API] = Fault(**vars(fault))
    code, output = examined(capsys, monkeypatch)
    assert code == 1 and output.splitlines()[-1] == f"NO-GO: {PICKSCORE}: {state}"
    assert f" {state} " in line(output, PICKSCORE) and "~3.95 GB" in line(output, PICKSCORE)
    assert [one for one in output.splitlines() if one.startswith("- ")][0].count(words) == 1
    assert len([one for one in output.splitlines() if one.startswith("- ")]) == 1


def test_a_gated_repository_that_lists_its_files_is_still_gated(hub, capsys, monkeypatch):
    hub.repo(PICKSCORE).gated = True
    code, output = examined(capsys, monkeypatch)
    assert code == 1 and " gated " in line(output, PICKSCORE)


def test_what_is_gone_comes_with_the_copy_and_the_setting(hub, paper, capsys, monkeypatch):
    del hub.repos[("dataset", PAIRS)]
    code, output = examined(capsys, monkeypatch)
    assert code == 1 and "'datasets={pickapic_v2: {repo: liuhuohuo2/pick-a-pic-v2}}'" in output


def test_an_entry_whose_files_are_not_there_is_wrong(hub, capsys, monkeypatch):
    hub.repo(VAE).commit({"config.json": b"{}"})
    code, output = examined(capsys, monkeypatch)
    assert code == 1 and f"{VAE}: wrong entry" in output.splitlines()[-1]
    assert f"{VAE} has no file diffusion_pytorch_model.safetensors" in output


def test_offline_it_works_from_the_cache(hub, paper, capsys, monkeypatch, tmp_path):
    for name in needed(paper):
        fetch(paper, name)
    capsys.readouterr()
    asked = len(hub.requests)
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, output = examined(capsys, monkeypatch)
    assert code == 0 and all(" cached " in line(output, name) for name in needed(paper))
    assert "lock " in line(output, VAE) and line(output, VAE).count(" 0.0 MB ") == 2
    place = (tmp_path / "results/paper/hub" / VAE / "config.json").resolve()
    place.unlink()
    code, output = examined(capsys, monkeypatch)
    assert code == 1 and output.splitlines()[-1] == f"NO-GO: {VAE}: offline: not cached"
    assert len(hub.requests) == asked


def test_offline_without_a_cache_the_same_sentence_stands_once(hub, paper, capsys, monkeypatch):
    monkeypatch.setenv(OFFLINE_VARIABLE, "1")
    code, output = examined(capsys, monkeypatch)
    sentences = [one for one in output.splitlines() if one.startswith("- ")]
    unpinned = sum(paper.repositories[name].revision is None for name in needed(paper))
    assert code == 1 and len(sentences) == 2 and f"(The same of {unpinned - 1} more.)" in "".join(sentences)
    assert f"NO-GO: {len(needed(paper))} repositories: offline: not cached" in output and hub.requests == []


def test_pin_writes_every_unset_revision_once(hub, paper, capsys, monkeypatch, tmp_path):
    hub.repo(PICKSCORE).faults[API] = Fault(503)
    code, output = examined(capsys, monkeypatch, "--pin")
    pinned = read_lock(tmp_path / LOCK)
    assert set(pinned) == {n for n in needed(paper) if paper.repositories[n].revision is None} - {PICKSCORE}
    assert code == 1 and f"lock {pinned[VAE][:7]}" in line(output, VAE)
    hub.repo(VAE).commit({"config.json": b"", "diffusion_pytorch_model.safetensors": b"newer"})
    hub.repo(PICKSCORE).faults.clear()
    code, _ = examined(capsys, monkeypatch, "--pin")
    assert code == 0 and read_lock(tmp_path / LOCK)[VAE] == pinned[VAE] and PICKSCORE in read_lock(tmp_path / LOCK)


def test_a_lock_that_changed_after_the_fetch_is_noticed(hub, paper, capsys, monkeypatch, tmp_path):
    fetch(paper, VAE)
    before = read_lock(tmp_path / LOCK)[VAE]
    publish_newer = {"config.json": b"", "diffusion_pytorch_model.safetensors": b"newer"}
    after = hub.repo(VAE).commit(publish_newer)
    (tmp_path / LOCK).write_text((tmp_path / LOCK).read_text().replace(before, after))
    code, output = examined(capsys, monkeypatch)
    assert code == 1 and f"NO-GO: {VAE}: fetched at another commit" in output
    assert f"was fetched at commit {before[:7]} and is now to be {after[:7]}" in output
    assert given(output) == ["pso.fetch", "--repo", VAE, "--set", '{"scale": "paper"}']
    assert json.loads(fetch(paper, VAE).read_text())["revision"] == after
    assert examined(capsys, monkeypatch)[0] == 0


def given(output) -> list[str]:
    """The words of the command that is named for a repository's files."""
    return shlex.split(re.search("`python -m (pso.fetch .*?)`", output)[1])


@pytest.mark.parametrize("emptied", ["home/hub", "results/paper/hub/madebyollin"])
def test_a_cache_that_was_emptied_after_the_fetch_is_noticed(hub, paper, capsys, monkeypatch, tmp_path, emptied):
    """Snakemake is content with the step file, so nothing would be fetched again."""
    fetch(paper, VAE)
    assert examined(capsys, monkeypatch)[0] == 0
    shutil.rmtree(tmp_path / emptied)
    code, output = examined(capsys, monkeypatch)
    assert code == 1 and f"NO-GO: {VAE}: fetched, then lost" in output
    assert f"{VAE} was fetched and has no config.json any more (2 of 2 files are gone)" in output
    assert given(output) == ["pso.fetch", "--repo", VAE, "--set", '{"scale": "paper"}']
    fetch(paper, VAE)
    assert examined(capsys, monkeypatch)[0] == 0


def test_tokens_are_named_and_never_shown(hub, capsys, monkeypatch, tmp_path):
    _, without = examined(capsys, monkeypatch)
    assert "HF_TOKEN not set, GITHUB_TOKEN not set, token file not there" in without
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("GITHUB_TOKEN", TOKEN)
    (tmp_path / "home/token").write_text(TOKEN)
    _, with_all = examined(capsys, monkeypatch, "--pin")
    assert "HF_TOKEN set, GITHUB_TOKEN set, token file there" in with_all and TOKEN not in with_all
    assert any(TOKEN in (request.authorization or "") for request in hub.requests)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or path.name == "token" or TOKEN not in path.read_text(), path


def test_a_small_disk_is_no_go(hub, capsys, monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 1)
    code, output = examined(capsys, monkeypatch)
    assert code == 1 and output.splitlines()[-1].startswith("NO-GO: the disk lacks 0.0 GB for files to fetch; ")


def test_a_disk_for_the_files_alone_is_no_go_because_results_need_more(hub, capsys, monkeypatch, tmp_path):
    """Latents 560.0, text conditions 79.4, images 137.6, LoRAs 20.5 GB; what is there counts."""
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 500 * 10**9)
    code, output = examined(capsys, monkeypatch)
    told = "NO-GO: the disk lacks {} GB for latents, images and LoRAs"
    assert code == 1 and output.splitlines()[-1] == told.format("297.5")
    (tmp_path / "results/paper/cache").mkdir(parents=True)
    with open(tmp_path / "results/paper/cache/made", "wb") as file:
        file.truncate(10 * 10**9)  # a sparse file
    assert examined(capsys, monkeypatch)[1].splitlines()[-1] == told.format("287.5")


def test_a_folder_of_ones_own_is_looked_into(hub, paper, capsys, monkeypatch, tmp_path):
    own = paper.datasets["pickapic_v2"].model_copy(update={"repo": str(tmp_path / "own"), "files": "x-*.parquet"})
    config = paper.model_copy(update={"datasets": paper.datasets | {"pickapic_v2": own}})
    monkeypatch.setattr(doctor, "from_arguments", lambda args: config)
    code, output = examined(capsys, monkeypatch)
    said = "NO-GO: the folder of datasets.pickapic_v2.repo has no x-*.parquet"
    assert code == 1 and output.splitlines()[-1] == said and str(tmp_path) not in output
    (tmp_path / "own").mkdir()
    (tmp_path / "own/x-1.parquet").write_bytes(b"")
    code, output = examined(capsys, monkeypatch)
    assert code == 0 and line(output, "data pickapic_v2,").split()[-1] == "1"


def test_needs_on_one_disk_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 10e9)
    found = machine.disk([("a", tmp_path, 6e9), ("b", tmp_path / "not" / "there", 6e9)])
    assert [finding.reason for finding in found] == [None, "the disk lacks 2.0 GB for b"]


def with_gpus(monkeypatch, *gib):
    found = [SimpleNamespace(name="a GPU", total_memory=each * 2**30) for each in gib]
    cuda = SimpleNamespace(
        is_available=lambda: bool(found), device_count=lambda: len(found), get_device_properties=found.__getitem__
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


@pytest.mark.parametrize(
    ("gib", "reason", "there"),
    [
        ([], "no GPU is seen (as it should be on a login node: `python -m pso.doctor --gpu-elsewhere`)", "no GPU"),
        ([80], None, "a GPU 80 GiB"),
        ([80, 16], "a GPU has 16 GiB of the 24", "a GPU 80 GiB, a GPU 16 GiB"),
        ([24], None, "a GPU 24 GiB; enough with gradient checkpointing"),
    ],
)
def test_gpu_memory_against_need(paper, monkeypatch, gib, reason, there):
    with_gpus(monkeypatch, *gib)
    (found,) = machine.gpus(paper)
    assert found.there == there and "tune 40 GiB" in found.need
    assert found.reason is None if reason is None else found.reason.startswith(reason)


def test_packages_that_are_missing_or_do_not_fit_are_named(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text('[project]\ndependencies = ["pyyaml>=5", "no-such-package>=1", "numpy<1"]\n')
    summary, *wrong = machine.packages(path)
    assert summary.there == "1 fit" and summary.reason is None
    assert [one.what for one in wrong] == ["package no-such-package", "package numpy"]
    assert wrong[0].reason == "package no-such-package is missing" and wrong[1].reason.startswith("package numpy is ")


@pytest.mark.parametrize("scale", ["miniature", "smoke"])
def test_a_stand_in_world_needs_disk_and_packages_only(hub, capsys, monkeypatch, scale):
    config = load({"scale": scale})
    monkeypatch.setattr(doctor, "from_arguments", lambda args: config)
    code, output = examined(capsys, monkeypatch)
    assert code == 0 and "fetches nothing" in output and hub.requests == []
    assert "disk for stand-in world" in output and "packages" in output and "GPU" not in output


def test_random_weights_need_the_published_sizes(paper):
    from pso.entries import RandomWeights

    def needs(sizes):
        random = RandomWeights(sizes=sizes, num_pairs=1, num_prompts=1)
        entry = paper.scale_entry.model_copy(update={"random": random})
        config = paper.model_copy(update={"scale_entry": entry})
        return doctor.disk_needs(config, [], doctor.RESULTS)[0][2], machine.gpus(config, elsewhere=True)

    weights = [e.size_gb for n, e in paper.repositories.items() if n in needed(paper) and e.source == "hub_model"]
    assert needs("published")[0] == pytest.approx(1e9 * sum(weights)) and needs("published")[1]
    assert needs("small")[0] < 1e10 and not needs("small")[1]


@pytest.mark.parametrize(
    ("arguments", "module", "said"),
    [(["--why", "results/a/run"], "why", "why of results/a/run in results"), (["--cost"], "estimate", "cost of []"),
     (["--why", "here/a/run", "--results", "here"], "why", "why of here/a/run in here"),
     (["--cost", "table1", "table2"], "estimate", "cost of ['table1', 'table2']")],
)  # fmt: skip
def test_why_and_cost_are_asked_of_their_modules(hub, capsys, monkeypatch, arguments, module, said):
    word = "why" if module == "why" else "cost"
    found = SimpleNamespace(text=lambda config, what, *root: " in ".join(map(str, [f"{word} of {what}", *root])))
    monkeypatch.setitem(sys.modules, f"pso.{module}", found)
    monkeypatch.setattr(pso, module, found, raising=False)
    monkeypatch.setattr(sys, "argv", ["doctor", *arguments])
    doctor.main()
    assert capsys.readouterr().out == f"{said}\n" and hub.requests == []


def test_the_command_from_a_shell(tmp_path):
    """No hub at all behind the address: one table, one sentence, exit code 1, no traceback."""
    with FakeHub() as hub:
        environment = hub.environment(tmp_path / "home")
        done = run(
            sys.executable, "-m", "pso.doctor", "--gpu-elsewhere", "--set", json.dumps({"scale": "paper"}),
            cwd=tmp_path, **environment,
        )  # fmt: skip
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.splitlines()[-1].startswith("NO-GO: 24 repositories: gone")


def test_snakemake_doctor_is_a_target_of_its_own(tmp_path):
    done = snakemake("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "GO: scale smoke can start" in done.stdout + done.stderr
    assert [p.name for p in (tmp_path / "results").rglob("*") if p.is_file()] == ["doctor.log"]


def test_a_mirror_at_the_rehearsal_is_no_error(tmp_path, capsys, monkeypatch):
    settings = json.dumps({"scale": "rehearsal", "datasets": {"pickapic_v2": {"repo": "liuhuohuo2/pick-a-pic-v2"}}})
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 10**12)
    monkeypatch.chdir(tmp_path)
    code, output = examined(capsys, monkeypatch, "--set", settings)
    assert code == 0 and "disk for weights drawn at random" in output
