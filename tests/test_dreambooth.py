"""The DreamBooth folder: the real one where it is present, and stand-ins."""

import re
from pathlib import Path

import pytest
from test_data import FIRST, entry, real, refused

from pso.data import parse_image
from pso.dreambooth import load_dreambooth, read_prompt_file

LINE = "'a {0} {1} in {2}'.format(unique_token, class_token)"
OBJECTS, ANIMALS = "'a {0} {1} on a mirror'", '"the {0} {1}\'s red hat"'
FILE = f"""Classes

subject_name,class
backpack_dog,backpack
cat2,cat
bear_plushie,stuffed animal

Prompts

Object Prompts

prompt_list = [
{OBJECTS}.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
{ANIMALS}.format(unique_token, class_token),
'a wet {{0}} {{1}}'.format(unique_token, class_token)
]
"""


def folder(path: Path, text: str = FILE, subjects=("backpack_dog", "cat2")) -> Path:
    (path / "prompts_and_classes.txt").write_text(text)
    for subject in subjects:
        (path / subject).mkdir()
        for name in ("01.jpg", "00.JPG", "02.jpg"):
            (path / subject / name).write_bytes(FIRST)
    return path


def test_the_real_folder():
    found = load_dreambooth(real("dreambooth"), entry("dreambooth", num_rows=30))
    assert [s.name for s in found.subjects] == ["backpack", "berry_bowl", "can", "cat", "dog", "teapot"]
    assert [len(s.images) for s in found.subjects] == [6, 6, 6, 5, 5, 5]
    assert [s.name for s in found.subjects if s.live] == ["cat", "dog"]
    assert all(len(s.templates) == len(set(s.prompts("[V]"))) == 25 for s in found.subjects)
    assert len(found.absent) == 24 and "backpack_dog" in found.absent and found.unlisted == []
    cat = found.subjects[3].prompts("[V]")
    assert (cat[10], cat[-1]) == ("a [V] cat wearing a red hat", "a cube shaped [V] cat")
    assert found.subjects[1].prompts("[V]")[10] == "a [V] bowl with a wheat field in the background"
    assert {parse_image(s.images[0].read_bytes()).mode for s in found.subjects} == {"RGB"}


def test_the_real_prompt_file():
    classes, templates = read_prompt_file(real("dreambooth") / "prompts_and_classes.txt")
    live = [name for name, of in classes.items() if of in ("cat", "dog")]
    assert (len(classes), len(set(classes.values()))) == (30, 15)
    assert live == ["cat", "cat2", "dog", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8"]
    assert len(templates[False]) == len(templates[True]) == 25
    assert len(set(templates[False]) & set(templates[True])) == 15


def test_live_is_decided_by_class_and_absent_subjects_are_told(tmp_path):
    (tmp_path / "my_photos").mkdir()
    found = load_dreambooth(folder(tmp_path))
    assert [(s.name, s.class_name, s.live) for s in found.subjects] == [
        ("backpack_dog", "backpack", False),  # a substring test would call it live
        ("cat2", "cat", True),
    ]
    assert (found.absent, found.unlisted) == (["bear_plushie"], ["my_photos"])
    assert found.subjects[0].prompts("[V]") == ["a [V] backpack on a mirror"]
    assert found.subjects[1].prompts("{0}") == ["the {0} cat's red hat", "a wet {0} cat"]
    assert [path.name for path in found.subjects[1].images] == ["00.JPG", "01.jpg", "02.jpg"]


@pytest.mark.parametrize(
    "old, new, parts",
    [
        (OBJECTS, "'a {0} on a mirror'", ["line 13 is", "with {0} and {1}"]),
        (OBJECTS, "'a {0.__class__} {1}'", ["line 13 is"]),
        (OBJECTS, "'a {0!r} {1}'", ["line 13 is"]),
        (OBJECTS, "'a {0} {1'", ["line 13 is"]),
        (OBJECTS, "open('x').read() or 'a {0} {1}'", ["line 13 is"]),
        (OBJECTS + ".format(unique_token, class_token)\n", "", ["line 12 begins an empty list", "Object Prompts"]),
        ("cat2,cat", "cat2", ["line 5 is 'cat2'", "expected a new `subject_name,class`"]),
        ("cat2,cat", "../cat2,cat", ["line 5 is '../cat2,cat'"]),
        ("cat2,cat", "backpack_dog,cat", ["line 5 is 'backpack_dog,cat'"]),
        ("Live Subject Prompts", "Animals", ["has no line 'Live Subject Prompts'", "fetch the file again"]),
        ("Prompts\n\nObject", "Object", ["has no line 'Prompts'"]),
        ("subject_name,class", "name,class", ["has no line 'subject_name,class'"]),
    ],
)
def test_a_malformed_prompt_file_is_named_by_line(tmp_path, old, new, parts):
    with refused("prompts_and_classes.txt", *map(re.escape, parts)):
        load_dreambooth(folder(tmp_path, FILE.replace(old, new, 1)))


def test_folders_that_are_not_dreambooth(tmp_path):
    with refused("prompts_and_classes.txt is missing", "`dataset` of google/dreambooth", "fetch it"):
        load_dreambooth(tmp_path)
    with refused("none of the 3 folders"):
        load_dreambooth(folder(tmp_path, subjects=()))
    with refused("names 3 subjects", "datasets.set.num_rows expects 30"):
        load_dreambooth(tmp_path, entry("dreambooth", num_rows=30), "set")
    (tmp_path / "cat2").mkdir()
    with refused("cat2 holds no picture"):
        load_dreambooth(tmp_path)
    (tmp_path / "cat2" / "photo.heic").touch()
    with refused("photo.heic is not a picture", r"\.jpg", "convert it"):
        load_dreambooth(tmp_path)
