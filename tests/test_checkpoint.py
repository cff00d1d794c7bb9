"""Checkpoints and the log of a run: what is kept, what is skipped, what is refused; on the toy policy."""

import json
import logging
import shutil

import pytest
import torch
import toy

from pso.checkpoint import Checkpoints
from pso.journal import Journal
from pso.paths import finished_state
from pso.provenance import Meter, UserError

MADE_FROM = {"settings": {"beta": 5.0}, "weights and data": [{"file": "x", "sha256": "0"}], "code": "abc"}
FILES = ("lora.safetensors", "optimizer.pt", "source.safetensors", "progress.json")


class Source:
    """A source with a state: the number of the last update."""

    def __init__(self):
        self.seen = torch.zeros(1)

    def state(self):
        return {"seen": self.seen}

    def set_state(self, state):
        self.seen = state["seen"]


class Session:
    """One process of a run: a fresh policy, optimiser and source on the same folder."""

    def __init__(self, folder, **made_from):
        self.policy, self.source, self.meter = toy.new_policy(), Source(), Meter()
        self.optimizer = torch.optim.AdamW(self.policy.lora_parameters(), lr=0.1)
        self.checkpoints = Checkpoints(folder, MADE_FROM | made_from, self.meter)
        self.start = None

    def restore(self):
        self.start = self.checkpoints.restore(self.policy, self.optimizer, self.source)
        return self

    def train(self, *updates: int):
        """Update after update; the LoRA after each, by update."""
        found = {}
        for update in updates:
            for i, parameter in enumerate(self.policy.lora_parameters()):
                parameter.grad = toy.randn(100 * update + i, *parameter.shape)
            self.optimizer.step()
            self.source.seen = torch.tensor([float(update)])
            self.meter.counts = {"unet_forwards": self.policy.unet_forwards}
            self.checkpoints.save(update, self.policy, self.optimizer, self.source)
            found[update] = self.lora()
        return found

    def lora(self):
        return torch.cat([p.detach().flatten() for p in self.policy.lora_parameters()])

    def moments(self):
        return [v["exp_avg"].clone() for v in self.optimizer.state_dict()["state"].values()]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_two_are_kept_and_the_newest_is_loaded(folder):
    first = Session(folder)
    loras = first.train(1, 2, 3)
    assert names(folder) == ["update0000002", "update0000003"]
    second = Session(folder).restore()
    assert second.start == 3 and second.source.seen == 3 and second.checkpoints.resumed_at == [3]
    assert torch.equal(second.lora(), loras[3]) and not torch.equal(loras[2], loras[3])
    assert all(torch.equal(a, b) for a, b in zip(second.moments(), first.moments(), strict=True))
    assert Session(folder / "none").restore().start == 0


def damage(path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["missing", "cut", "one bit"])
@pytest.mark.parametrize("file", FILES)
def test_a_broken_checkpoint_is_skipped_for_the_one_before(folder, caplog, file, how):
    loras = Session(folder).train(3, 6)
    damage(folder / "update0000006" / file, how)
    with caplog.at_level(logging.INFO):
        session = Session(folder).restore()
    assert session.start == 3 and torch.equal(session.lora(), loras[3]) and session.source.seen == 3
    first, last = caplog.messages
    assert first == f"{folder / 'update0000006'} is not whole ({file} is missing or damaged); it is removed."
    assert last == "continuing after update 3"
    assert torch.equal(session.train(6)[6], loras[6])
    assert names(folder) == ["update0000003", "update0000006"]


def test_a_run_whose_checkpoints_are_all_broken_starts_anew(folder, caplog):
    Session(folder).train(3, 6)
    damage(folder / "update0000003" / "optimizer.pt", "missing")
    damage(folder / "update0000006" / "progress.json", "cut")
    session = Session(folder).restore()
    assert session.start == 0 and session.checkpoints.resumed_at == [] and session.moments() == []
    assert torch.equal(session.lora(), Session(folder).lora())
    assert caplog.messages[-1] == f"{folder} holds no whole checkpoint; this run starts anew."
    session.train(3)


@pytest.mark.parametrize("name", MADE_FROM)
def test_a_checkpoint_made_from_something_else_is_refused_and_kept(folder, name):
    Session(folder).train(3)
    session = Session(folder, **{name: "other"})
    before = session.lora()
    with pytest.raises(UserError) as caught:
        session.restore()
    assert f"was written with other {name}; remove {folder} to start this run anew" in str(caught.value)
    assert torch.equal(session.lora(), before) and names(folder) == ["update0000003"]


def test_everything_that_differs_is_said(folder):
    Session(folder).train(3)
    with pytest.raises(UserError, match="was written with other settings, code; remove"):
        Session(folder, settings=1, code=2).restore()


def test_the_cost_of_the_sessions_before_is_added(folder):
    first = Session(folder)
    first.policy.unet_forwards = 40
    first.train(1)
    path = folder / "update0000001" / "progress.json"
    progress = json.loads(path.read_text())
    path.write_text(json.dumps(progress | {"cost": progress["cost"] | {"wall_s": 1000.0, "cpu_s": 900.0}}))
    second = Session(folder).restore()
    second.policy.unet_forwards = 2
    second.train(2)
    cost = Session(folder).restore().meter.earlier
    assert cost["wall_s"] >= 1000 and cost["cpu_s"] >= 900 and cost["unet_forwards"] == 42


def test_a_finished_run_has_no_state(folder):
    session = Session(folder)
    session.checkpoints.finish()  # nothing was saved: nothing to do
    assert list(folder.parent.iterdir()) == []
    session.train(3)
    session.checkpoints.finish()
    assert list(folder.parent.iterdir()) == [finished_state(folder.parent)]


def test_a_run_that_is_made_again_after_its_end_goes_on_from_its_last_checkpoint(folder):
    """Killed between its end and the workflow's seeing it, which then deletes its results."""
    first = Session(folder)
    loras = first.train(3, 6)
    first.checkpoints.finish()
    again = Session(folder).restore()
    assert again.start == 6 and torch.equal(again.lora(), loras[6]) and again.checkpoints.resumed_at == [6]
    again.checkpoints.finish()
    assert list(folder.parent.iterdir()) == [finished_state(folder.parent)]


@pytest.mark.parametrize("what", ["made from other settings", "half removed", "older than the state"])
def test_what_a_finished_run_left_is_removed_where_it_is_of_no_use(folder, what):
    first = Session(folder, **({"settings": 1} if what == "made from other settings" else {}))
    first.train(3, 6)
    first.checkpoints.finish()
    if what == "half removed":
        shutil.rmtree(finished_state(folder.parent) / "update0000006")
        damage(finished_state(folder.parent) / "update0000003" / "optimizer.pt", "missing")
    if what == "older than the state":
        Session(folder).train(1)
    assert Session(folder).restore().start == (1 if what == "older than the state" else 0)
    assert not finished_state(folder.parent).exists()


def test_what_a_kill_left_of_a_save_does_not_count(folder):
    Session(folder).train(3)
    shutil.copytree(folder / "update0000003", folder / ".update0000006.part")
    session = Session(folder).restore()
    assert session.start == 3
    session.train(6)
    assert names(folder) == ["update0000003", "update0000006"]


# ---- the log ----

CUT = {"mid-word": '{"event": "upd', "number": "12", "empty": "", "other": '{"event": "update"}', "binary": "\0\0"}


@pytest.mark.parametrize("line", CUT)
def test_lines_that_cannot_be_read_and_later_ones_are_dropped(tmp_path, line):
    path = tmp_path / "train.jsonl"
    first = Journal(path, 0, 9)
    for update in range(1, 6):
        first.update(update, {"loss": 0.5})
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines) + CUT[line])
    again = Journal(path, 3, 9)
    assert path.read_text() == "".join(lines[:3])
    for update in (4, 5):
        again.update(update, {"loss": 0.5})
    assert path.read_text() == "".join(lines)


def test_a_run_that_starts_anew_forgets_its_old_log(tmp_path):
    Journal(tmp_path / "train.jsonl", 0, 9).update(1, {"loss": 0.5})
    Journal(tmp_path / "train.jsonl", 0, 9)
    assert (tmp_path / "train.jsonl").read_text() == ""


def test_a_kill_while_the_log_is_rewritten_keeps_it(tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    first = Journal(path, 0, 9)
    for update in range(1, 6):
        first.update(update, {"loss": 0.5})
    before = path.read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Journal(path, 3, 9)
    assert path.read_text() == before
