"""The look of figures: colours that anyone tells apart, a method's line everywhere the same, files and elements."""

import itertools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure

from eval import style
from pso.config import load
from pso.entries import MethodEntry

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
MACHADO = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    "none": np.eye(3).tolist(),
}
SRGB = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
TOLD_APART = 10  # CIE76 difference; from about 2.3 on two colours side by side are seen to differ


def lab(colour: str, seen_by: str) -> np.ndarray:
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.array(SRGB) @ np.clip(np.array(MACHADO[seen_by]) @ linear, 0, 1) / np.array(SRGB).sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def closest(colours, seen_by: str) -> float:
    seen = [lab(colour, seen_by) for colour in colours]
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("seen_by", MACHADO)
def test_colours_are_told_apart_with_any_colour_vision(seen_by):
    assert closest(style.COLOURS, seen_by) > TOLD_APART


def test_the_measure_finds_colours_that_are_not():
    """matplotlib's own red and green, equally light."""
    assert closest(["#a65c00", "#6b7a00"], "none") > TOLD_APART > closest(["#a65c00", "#6b7a00"], "protanopia")


# ---- a method's line ----


def in_grey(found: dict) -> tuple:
    return found["marker"], str(found["linestyle"]), found["fillstyle"]


def test_every_entry_has_a_line_of_its_own_in_grey():
    config = load({})
    found = {in_grey(style.method_style(config, name)) for name in config.methods}
    assert len(found) == len(config.methods) > 20


def test_methods_of_one_module_share_colour_and_marker_and_differ_in_dash():
    config = load({})
    one, other = (style.method_style(config, name) for name in ("dpo_transplant", "dpo_adapted"))
    assert (
        (one["color"], one["marker"]) == (other["color"], other["marker"]) == style.MODULES["baselines.diffusion_dpo"]
    )
    assert one["linestyle"] != other["linestyle"]


@pytest.mark.parametrize("tables", [["table1"], ["table4", "table2"]])
def test_a_methods_line_does_not_depend_on_what_else_is_shown(tables):
    found = style.method_style(load({"tables": tables}), "pso_offline")
    assert (found["color"], found["marker"], found["linestyle"]) == (style.BLUE, "o", "-")


def test_methods_of_others_follow_in_the_order_of_their_entries():
    config = load({})
    theirs = {
        f"new{i}": MethodEntry.model_construct(title="", module=f"lab.method{i}", data="", objective={})
        for i in range(12)
    }
    wider = config.model_copy(update={"methods": {**config.methods, **theirs}})
    found = [style.method_style(wider, name) for name in theirs]
    assert found[0]["marker"] == "*" and len({(f["color"], f["marker"]) for f in found}) == 12
    own = {marker for _, marker in style.MODULES.values()}
    assert own.isdisjoint(f["marker"] for f in found)
    assert style.method_style(wider, "spo") == style.method_style(config, "spo")


# ---- files ----


def drawn() -> Figure:
    with style.look():
        figure = Figure(figsize=(6, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot([1, 2, 3], marker="o", color=style.BLUE, label="a < b & c")
        left.axhline(1.5, **style.UNTUNED_LINE)
        left.set(title="Reward", xlabel="Update")
        left.fill_between([0, 1, 2], [0, 1, 2], [2, 3, 4], color=style.BLUE, alpha=0.2, linewidth=0)
        right.plot([3, 2, 4], marker="s", linestyle=(0, (5, 2)), color=style.INK)
        right.set_xlabel("$10^{-3}$")
        right.pcolormesh([[0.0, 0.5], [0.5, 1.0]])
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center")
    return figure


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_files_are_the_same_twice_and_whatever_was_written_before(tmp_path, suffix):
    first = style.save(drawn(), tmp_path / f"first{suffix}").read_bytes()
    figure = drawn()
    style.svg(figure, "x", "", "")
    style.save(figure, tmp_path / f"before{'.pdf' if suffix == '.png' else '.png'}")
    assert style.save(figure, tmp_path / f"second{suffix}").read_bytes() == first
    assert b"Date" not in first and b"atplotlib" not in first.replace(b"atplotlib.axis", b"")


def test_a_figure_is_laid_out_once_and_drawn_once_for_each_file(tmp_path, monkeypatch):
    figure, draws = drawn(), []
    draw = Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda self, renderer: draws.append(1) or draw(self, renderer))
    style.save(figure, tmp_path / "a.png")
    style.save(figure, tmp_path / "a.pdf")
    style.svg(figure, "x", "", "")
    assert len(draws) == 4, "the layout, then three files"


def test_look_is_of_what_is_drawn_within_it_and_nothing_else():
    before = matplotlib.rcParams["axes.grid"]
    with style.look():
        assert matplotlib.rcParams["axes.grid"] is True
    assert matplotlib.rcParams["axes.grid"] == before is False


# ---- elements of a page ----


class Page(HTMLParser):
    """Elements that were opened and not closed, and every attribute."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def element() -> str:
    return style.svg(drawn(), "demo", "Title & more", "What it <shows>")


def test_an_element_is_itself_and_asks_for_nothing(element):
    assert element.startswith("<svg ") and element == style.svg(drawn(), "demo", "Title & more", "What it <shows>")
    for bad in ("<?xml", "<!DOCTYPE", "http", "xlink", "xmlns", "<style", "metadata", "DejaVu", "ns0:"):
        assert bad not in element
    page = Page(element)
    assert page.open == []
    root = page.seen[0][1]
    assert "width" not in root and "height" not in root
    assert root["viewbox"] == "0 0 432 216" and "max-width:576px" in root["style"]


def test_an_element_is_told_to_those_who_do_not_see_it(element):
    root = ElementTree.fromstring(element)
    told = {child.attrib["id"]: child.text for child in root if child.tag in ("title", "desc")}
    assert root.attrib["role"] == "img" and root.attrib["aria-labelledby"].split() == list(told)
    assert list(told.values()) == ["Title & more", "What it <shows>"]
    texts = [text.text for text in root.iter("text")]
    assert {"Reward", "Update", "a < b & c"} <= set(texts), "text is text"


def test_ids_are_the_figures_own_and_every_reference_is_answered(element):
    root = ElementTree.fromstring(element)
    ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
    assert len(ids) == len(set(ids)) and all(one.startswith("demo-") for one in ids)
    asked = set(re.findall(r'(?:url\(|href=")#([\w-]+)', element))
    assert len(asked) > 4 and asked <= set(ids)
    other = style.svg(drawn(), "other", "", "")
    assert set(ids).isdisjoint(re.findall(r'id="([^"]+)"', other))


def test_ink_follows_the_page_and_nothing_lies_behind(element):
    root = ElementTree.fromstring(element)
    assert root.attrib["fill"] == "currentColor"
    assert "#000000" not in element and "#ffffff" not in element
    stroked = [e for e in root.iter("path") if e.get("stroke") == "currentColor"]
    assert stroked and style.BLUE.lower() in element
