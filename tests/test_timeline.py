"""timeline.jsonl: what a run says of itself to whoever watches, over restarts, kills and full disks."""

import errno
import io
import json

import pytest

from pso import timeline
from pso.provenance import UserError
from pso.timeline import Timeline, append, read


def started(path, update=0):
    line = Timeline(path)
    line.began(update, 100, 2, 1)
    return line


def test_sessions_stand_one_after_the_other(tmp_path):
    path = tmp_path / "timeline.jsonl"
    first = started(path)
    first.stopped(40, "SIGTERM")
    second = started(path, 40)
    second.ended(100)
    found = read(path)
    told = [("began", 0), ("stopped", 40), ("began", 40), ("ended", 100)]
    assert [(entry["event"], entry["update"]) for entry in found] == told
    assert {k: found[0][k] for k in ("planned", "processes", "gpus")} == {"planned": 100, "processes": 2, "gpus": 1}
    assert found[0]["started"] <= found[0]["time"] <= found[-1]["time"] and found[1]["why"] == "SIGTERM"


def test_updates_are_written_every_ten_seconds_at_most(tmp_path, monkeypatch):
    path, now = tmp_path / "timeline.jsonl", [1000.0]
    monkeypatch.setattr(timeline.time, "monotonic", lambda: now[0])
    line = started(path)
    for update in range(1, 31):
        now[0] += 1.0
        line.at(update)
    assert [entry["update"] for entry in read(path) if entry["event"] == "at"] == [10, 20, 30]


def test_a_session_without_an_update_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(timeline.time, "monotonic", lambda: 0.0)  # a machine that has just started
    Timeline(tmp_path / "timeline.jsonl").at(3)
    assert [entry["update"] for entry in read(tmp_path / "timeline.jsonl")] == [3]


def test_a_line_after_a_torn_one_is_whole(tmp_path):
    path = tmp_path / "timeline.jsonl"
    started(path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    started(path, 7)
    assert [entry["update"] for entry in read(path)] == [0, 7]


def test_every_prefix_reads_as_the_lines_that_are_whole_in_it(tmp_path):
    path = tmp_path / "timeline.jsonl"
    line = started(path)
    line.stopped(3, "a full disk: \u2026")
    started(path, 3).ended(5)
    content, entries = path.read_bytes(), read(path)
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        whole = content[: end + 1].count(b"\n")  # a line needs no newline to be whole
        assert read(path) == entries[:whole]


@pytest.mark.parametrize(
    "line",
    ["", "5", "[]", "null", '"at"', "\0\0", "\ufeff{}", '{"event": "at"}', '{"event": "at", "time": 1, "update": "3"}',
     '{"event": "update", "time": 1, "update": 3}', '{"event": "began", "time": 1, "update": 3}'],
)  # fmt: skip
def test_lines_that_are_not_ours_are_left_out(tmp_path, line):
    path = tmp_path / "timeline.jsonl"
    path.write_bytes(line.encode() + b'\n\xff\xfe\n{"event": "at", "time": 2.5, "update": 4}\n')
    assert read(path) == [{"event": "at", "time": 2.5, "update": 4}]


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert read(tmp_path / "timeline.jsonl") == []


class Full(io.FileIO):
    """A disk on which `room` bytes are left."""

    room = 0

    def write(self, data):
        if not data[: Full.room]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = super().write(data[: Full.room])
        Full.room -= done
        return done


@pytest.mark.parametrize("room", [0, 1, 20])
def test_on_a_full_disk_a_line_is_not_there_at_all(tmp_path, monkeypatch, room):
    path = tmp_path / "timeline.jsonl"
    line = started(path)
    before, Full.room = path.read_bytes(), room
    monkeypatch.setattr(timeline, "open", lambda path, mode, buffering: Full(path, "a+"), raising=False)
    with pytest.raises(UserError, match="could not write .*timeline.jsonl: No space left on device; .*Make room"):
        line.ended(100)
    assert path.read_bytes() == before
    Full.room = 10_000
    line.ended(100)
    assert path.read_bytes().startswith(before) and read(path)[-1]["event"] == "ended"


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="could not write .*No such file or directory"):
        append(tmp_path / "gone" / "timeline.jsonl", {"event": "at"})


def test_a_short_write_goes_on(tmp_path, monkeypatch):
    class Short(io.FileIO):
        def write(self, data):
            return super().write(data[:3])

    path = tmp_path / "timeline.jsonl"
    monkeypatch.setattr(timeline, "open", lambda path, mode, buffering: Short(path, "a+"), raising=False)
    append(path, {"event": "at", "update": 5})
    assert json.loads(path.read_text()) == {"event": "at", "update": 5}
