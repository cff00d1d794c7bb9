"""How figures look, in one place: fonts, lines, colours, what a method's line looks like; and how they become files.

Colours are Okabe and Ito's, chosen to be told apart with any kind of colour vision (jfly.uni-koeln.de/color, 2008),
without their yellow, which is too pale for a line on white. A method has the same colour, marker and dash in every
figure: colour and marker are those of its module, dash and filling those of its entry among the module's entries, so
that lines are told apart in grey too. No torch.
"""

import functools
import io
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from pso.entries import Config
from pso.provenance import atomic

matplotlib.use("Agg")

DPI = 160
WIDTH = 8.0  # inches: as wide as a page of print, where it is made a little smaller
INK = "#000000"  # text and axes; the reader's own colour of text in a page (svg)
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK)
MODULES = {  # colour and marker; of the concept task's methods, which stand beside no other, PSO's green is RPO's too
    "pso.pso_offline": (BLUE, "o"),
    "pso.pso_online": (VERMILION, "s"),
    "pso.pso": (GREEN, "p"),
    "baselines.diffusion": (INK, "X"),
    "baselines.dreambooth": (INK, "d"),
    "baselines.diffusion_dpo": (ORANGE, "^"),
    "baselines.rpo": (GREEN, "v"),
    "baselines.mapo": (PURPLE, "P"),
    "baselines.spo": (SKY, "D"),
}
MORE_MARKERS = ("*", "<", ">", "h", "8", "H")  # of modules that are not ours, in the order of their entries
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (10, 3)))
FILLS = ("full", "none")
UNTUNED_LINE = {"color": INK, "alpha": 0.6, "linestyle": (0, (2, 2)), "linewidth": 1.2}  # across a panel, no marker

LOOK = {
    "figure.dpi": DPI,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9,
    "text.parse_math": False,  # a label may have a dollar sign
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 3.4,  # shows a dash whole
    "pdf.fonttype": 42,  # text that can be searched and edited
    "svg.fonttype": "none",
}
FORMATS = {  # no date and no version in a file: the same input gives the same bytes
    ".png": {"format": "png", "dpi": "figure", "metadata": {"Software": None}},
    ".pdf": {"format": "pdf", "dpi": "figure", "metadata": {"CreationDate": None, "Creator": None, "Producer": None}},
}

look = functools.partial(matplotlib.rc_context, LOOK)  # `with look():`, or `@look()` on what draws a figure


@dataclass(frozen=True)
class Drawn:
    """A figure under its name, and what is said of it where it stands: in a document or a page."""

    name: str
    figure: Figure
    title: str
    caption: str


def head(figure: Figure, text: str) -> None:
    """What has to be known of a figure that travels alone, above its panels."""
    lines = textwrap.wrap(text, int(figure.get_figwidth() * 15.5), break_on_hyphens=False)
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=8.5)


def method_style(config: Config, method: str) -> dict[str, Any]:
    """Keyword arguments of a line of one entry of methods.yaml."""
    entries = config.methods
    module = entries[method].module
    others = list(dict.fromkeys(entry.module for entry in entries.values() if entry.module not in MODULES))
    if module in MODULES:
        colour, marker = MODULES[module]
    else:
        place = others.index(module)
        colour, marker = COLOURS[place % len(COLOURS)], MORE_MARKERS[place % len(MORE_MARKERS)]
    place = [name for name, entry in entries.items() if entry.module == module].index(method)
    dash, fill = DASHES[place % len(DASHES)], FILLS[place % len(FILLS)]
    return {"color": colour, "marker": marker, "linestyle": dash, "fillstyle": fill}


def save(figure: Figure, path: Path) -> Path:
    """One file, as its suffix says."""
    _settle(figure)
    with look(), atomic(path) as part:
        figure.savefig(part, **FORMATS[path.suffix])
    return path


def _settle(figure: Figure) -> None:
    """Lay the figure out once: a layout that is found again for every file is another one each time.

    No ligatures: a PDF would take a second font file for them.
    """
    for text in figure.findobj(Text):
        text.set_fontfeatures(("-liga",))
    if figure.get_layout_engine() is not None:
        with look():
            figure.draw_without_rendering()
            figure.set_layout_engine(None)  # "none" would leave a placeholder, for which every file is drawn twice


# ---- in a page ----

NAMESPACE = re.compile(r"^\{[^}]*\}")
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
REFERENCE = re.compile(r"^#([\w-]+)$|^url\(#([\w-]+)\)$")
PLACES = {"d", "x", "y", "width", "height", "points", "transform", "viewBox"}
INHERITED = {"fill": "currentColor", "font-family": "sans-serif", "stroke-linejoin": "round", "stroke-linecap": "butt"}


def svg(figure: Figure, name: str, title: str, description: str) -> str:
    """An element for a page's body. Its ids begin with `name`, which no other figure of the page may have; `title` and
    `description` are what is read out in place of the picture.

    It is as wide as there is room, has no background, and what is black in print has the page's colour of text.
    """
    _settle(figure)
    with look(), matplotlib.rc_context({"svg.hashsalt": name}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = ElementTree.fromstring(file.getvalue())
    for element in drawn.iter():
        _plain(element)
    _rename(drawn, name)
    drawn[:] = _with_ink(drawn)
    width = float(drawn.attrib["viewBox"].split()[2]) * 96 / 72
    drawn.attrib = {
        "viewBox": drawn.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "style": f"width:100%;max-width:{width:.0f}px;height:auto",
        **INHERITED,
    }
    for place, (kind, text) in enumerate((("title", title), ("desc", description))):
        told = ElementTree.Element(kind, {"id": f"{name}-{kind}"})
        told.text, told.tail = text, "\n"
        drawn.insert(place, told)
    return ElementTree.tostring(drawn, encoding="unicode")


def _plain(element: ElementTree.Element) -> None:
    """Attributes in place of a style, no namespaces, no family of fonts, two decimals, the page's colour for ink."""
    element.tag, element.tail = NAMESPACE.sub("", element.tag), "\n"
    element.text = element.text if element.tag == "text" else None
    found = {NAMESPACE.sub("", key): value for key, value in element.attrib.items()}
    for part in filter(str.strip, found.pop("style", "").split(";")):
        key, _, value = part.partition(":")
        found[key.strip()] = value.strip()
    found.pop("font-family", None)
    for key, value in found.items():
        if value == INK:
            found[key] = "currentColor"
        elif key in PLACES:
            short = NUMBER.sub(lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value)
            found[key] = " ".join(short.split())
    element.attrib = found


def _rename(drawn: ElementTree.Element, name: str) -> None:
    """Ids that something refers to begin with `name`; others go."""
    there = {element.attrib["id"] for element in drawn.iter() if "id" in element.attrib}
    used = set()
    for element in drawn.iter():
        for key, value in element.attrib.items():
            match = REFERENCE.match(value)
            if match and (one := match[1] or match[2]) in there:
                used.add(one)
                element.attrib[key] = value.replace(f"#{one}", f"#{name}-{one}")
    for element in drawn.iter():
        one = element.attrib.pop("id", None)
        if one in used:
            element.attrib["id"] = f"{name}-{one}"


def _with_ink(element: ElementTree.Element) -> list[ElementTree.Element]:
    """Its children without what leaves no ink, <style> and <metadata>; groups that say nothing are dissolved."""
    kept = []
    for child in element:
        child[:] = _with_ink(child)
        bare = child.get("fill") == "none" and "stroke" not in child.attrib and "id" not in child.attrib
        if child.tag in ("style", "metadata") or child.tag == "path" and bare:
            continue
        if child.tag == "g" and not child.attrib:
            kept += child
        elif child.tag not in ("g", "defs") or len(child):
            kept.append(child)
    return kept
