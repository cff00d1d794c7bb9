"""What `eval.compare` found, as text of about 100 columns and as one HTML page; what matters most first. No torch."""

import math
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from tabulate import tabulate

from eval.compare_cells import HIGHER, LOWER, ONLY_A, ONLY_B, SAME
from eval.compare_config import PARTS, kind_of
from eval.compare_paper import DISAGREES
from eval.compare_same import sentence, shown
from eval.prose import grouped, listed
from eval.tables import DASH, digits
from pso.provenance import UserError
from pso.templates import environment

NOTHING, VERDICTS, CELLS, ANYTHING = KINDS = ("nothing", "verdicts", "cells", "anything")  # of --fail-on
WIDTH = 100
MOST_CELLS = 40  # of the text; the page and the JSON have all
MOST_RECORDS = 2  # that are named beside a change in the text
MOST_NAMED = 3  # cells without an interval that are named
ONLY_NUMBERS = "Costs, times and last losses are not compared."
PAPER_DIRECTION = ["Row", "Base", "Column", "Paper", "Ours", "95 % interval"]
PAPER_CELL = ["Row", "Column", "Paper", "Ours", "95 % interval", "Difference"]
FOLDER = Path(__file__).resolve().parent


# ---- numbers and words that text and page share ----


def number(found: dict, entry: dict, value: float | None, interval: list | None, signed: bool = False) -> str:
    """A value with enough digits for its interval; entry: what has a table and a metric."""
    if value is None:
        return DASH
    places = found["columns"].get(f"{entry['table']}.{entry['metric']}", {}).get("decimals", 4)
    places = digits(places + 1, interval) if interval else places + 1
    return f"{value:{'+' if signed else ''}z.{places}f}"


def between(found: dict, entry: dict, interval: list | None, signed: bool = False) -> str:
    if interval is None:
        return DASH
    return f"[{', '.join(number(found, entry, end, interval, signed) for end in interval)}]"


def title(found: dict, entry: dict) -> str:
    return found["columns"].get(f"{entry['table']}.{entry['metric']}", {}).get("title", entry["metric"])


def strength(entry: dict) -> float:
    """How clear a difference is: in widths of its interval, or of both intervals together."""
    if entry["difference"] is None:
        return math.inf
    if entry["difference"] == 0:
        return 0.0
    if entry["interval"] is not None:
        width = entry["interval"][1] - entry["interval"][0]
    else:
        width = sum(entry[side]["interval"][1] - entry[side]["interval"][0] for side in ("a", "b"))
    return abs(entry["difference"]) / width if width > 0 else math.inf


def moved(found: dict) -> list[dict]:
    """Cells that are higher, lower or in one tree only, the clearest first."""
    return sorted((e for e in found["cells"]["cells"] if e["verdict"] not in (SAME, None)), key=strength, reverse=True)


def _changed_but_same(found: dict) -> list[dict]:
    return [e for e in found["cells"]["cells"] if e["verdict"] == SAME and not e["equal"]]


def _not_judged(found: dict) -> list[str]:
    """A sentence on cells without an interval."""
    cells = [e for e in found["cells"]["cells"] if e["verdict"] is None]
    named = [f"{e['label']}, {title(found, e)} ({e['table']}, {e['eval_set']})" for e in cells[:MOST_NAMED]]
    named += [f"{len(cells) - MOST_NAMED} more"] if len(cells) > MOST_NAMED else []
    return [f"No interval in A or in B, so without a verdict: {listed(named)}."] if cells else []


def cell_line(found: dict, e: dict) -> str:
    """`SDXL-DMD2, PickScore (table1, pickapic_test): 22.46 in B, by +0.02`."""
    value = number(found, e, e["b"]["value"], e["b"]["interval"])
    return f"{e['label']}, {title(found, e)} ({e['table']}, {e['eval_set']}): {value} in B, by {e['difference']:+.2g}"


def tree_line(about: dict) -> str:
    if about["scale"] is None:
        return f"{about['name']}: the cells of its Tables 1 to 4 (eval/reference)"
    records = f"{about['records']} records of runs" if about["records"] else "no run.json"
    return f"{about['name']}: scale {about['scale']}; {', '.join(about['tables'])}; {about['claims']} claims; {records}"


def summary(found: dict) -> list[str]:
    """A sentence on each kind of difference."""
    if found["kind"] == "paper":
        return [
            f"{part.capitalize()}: {_counts(found[part]['counts']) or 'none'}."
            for part in ("directions", "claims", "cells")
            if found[part]
        ]
    told = [_verdicts_line(found, "directions"), _verdicts_line(found, "claims"), _cells_line(found)]
    if nearest := max(_changed_but_same(found), key=strength, default=None):
        told.append(f"The clearest change among the same: {cell_line(found, nearest)}.")
    return [*told, _config_line(found["config"])]


def _cells_line(found: dict) -> str:
    cells, left_out = found["cells"], found["left_out"]["cells"]
    counts = cells["counts"] | {"without a verdict": cells["not_judged"]}
    told = ["none compared"]
    if cells["compared"]:
        told = [f"{cells['compared']} compared, {_counts(counts)}", f"{cells['equal']} equal to the last digit"]
    told += [f"{cells['in_neither']} more have a number in neither"] if cells["in_neither"] else []
    return f"Cells: {'; '.join(told)}" + (f". {left_out} left out as not comparable." if left_out else ".")


def _verdicts_line(found: dict, part: str) -> str:
    section = found[part]
    if section["only_in"]:
        return f"{part.capitalize()}: not compared, {section['only_in']} alone has any."
    if not section["compared"] and section["missing"]:
        return f"{part.capitalize()}: not compared."
    changed = _counts(section["transitions"]) or "none"
    out = f", {section['left_out']} left out" if section["left_out"] else ""
    if not section["compared"]:
        return f"{part.capitalize()}: none compared{out}."
    some = f" ({section['measured'] or 'none'} measured in both)" if section["measured"] < section["compared"] else ""
    return f"{part.capitalize()}: {section['compared']} compared{some}{out}; verdicts changed: {changed}."


def _config_line(config: dict) -> str:
    parts = grouped(by_part(config["changes"]))
    if not config["records_compared"]:
        return "How they were made: not known."
    kinds = ", ".join(f"{PARTS[part].lower()} {len(changes)}" for part, changes in parts.items()) or "none"
    only = sum(len(config[f"records_only_in_{side}"]) for side in "ab")
    more = f"; {only} records in one tree only" if only else ""
    return (
        f"How they were made, over {sum(config['records_compared'].values())} records of both; changes: {kinds}{more}."
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.items() if number)


def notes(found: dict) -> list[str]:
    """What a reader must not overlook: not compared, not checked, out of date."""
    if found["kind"] == "paper":
        return [*found["notes"], *(f"Claims: {line}" for line in found["claims"]["missing"])]
    told = [*found["directions"]["missing"], *found["claims"]["missing"], *_other_family(found["claims"])]
    told += [*_not_judged(found), *found["config"]["missing"]]
    told += [f"Left out: {sentence(group)}." for group in found["left_out"]["because"]]
    if despite := [group["what"].removeprefix("scorer of ") for group in found["despite"]]:
        told.append(f"Compared although the code of the scorer is another: {listed(despite)} (--json has the hashes).")
    for kind, entry in found["unchecked"].items():
        if entry["what"]:
            told.append(
                f"A or B does not tell the {kind}, so not checked in {entry['cells']} cells: {listed(entry['what'])}."
            )
    return [*told, *(f"Out of date, {line}" for line in found["stale"])]


def _other_family(section: dict) -> list[str]:
    """Holm's p of a claim depends on all claims that are judged with it."""
    a, b = section["judged"]["a"], section["judged"]["b"]
    if a == b or not section["compared"]:
        return []
    return [
        f"A measured {a['measured']} of its {a['declared']} claims, B {b['measured']} of {b['declared']}; Holm's p is "
        "adjusted for all of them, so a claim's verdict may change by that alone. Its interval is not adjusted."
    ]


# ---- text ----


def to_text(found: dict) -> str:
    body = _paper(found) if found["kind"] == "paper" else _trees(found)
    parts = [f"A  {tree_line(found['a'])}\nB  {tree_line(found['b'])}", _wrapped(summary(found))]
    if told := notes(found):
        parts.append("Note\n" + _wrapped(told, "  - "))
    return "\n\n".join([*parts, *body, _outcome(found)])


def _outcome(found: dict) -> str:
    if found["fail_on"] == NOTHING:
        return f"--fail-on {NOTHING}: exit code 0, whatever was found"
    return f"--fail-on {found['fail_on']}: {'a' if found['differs'] else 'no'} difference"


def nothing_compared(found: dict, kind: str) -> UserError:
    """Why neither `a difference` nor `no difference` can be said."""
    lines = "\n".join(f"  - {line}" for line in [*summary(found)[: 2 if kind == VERDICTS else 3], *notes(found)])
    return UserError(
        f"nothing of what --fail-on {kind} names could be compared, so A and B cannot be said to differ or not:\n"
        f"{lines}\n--fail-on {NOTHING} shows all that was found."
    )


def _wrapped(lines: Iterable[str], mark: str = "") -> str:
    rest = " " * len(mark)
    return "\n".join(
        textwrap.fill(line, WIDTH, initial_indent=mark, subsequent_indent=rest, break_long_words=False)
        for line in lines
    )


def _trees(found: dict) -> list[str]:
    parts = [_changed(found, "directions"), _changed(found, "claims"), *_moved_cells(found), *_config(found["config"])]
    parts.append("How a cell is judged\n" + _wrapped(found["cells"]["rules"], "  - "))
    return [part for part in parts if part]


def _changed(found: dict, part: str) -> str | None:
    lines = []
    for entry in found[part]["changed"]:
        lines.append(_wrapped([f"{entry['change']}: {what(found, entry)}"], "  - "))
        sides = [(side.upper(), told(found, entry, entry[side])) for side in "ab" if entry[side]]
        if estimates := "; ".join(f"{side} {estimate}" for side, estimate in sides if estimate):
            lines.append(_wrapped([estimates], "    "))
    return "\n".join([f"{part.capitalize()} with another verdict", *lines]) if lines else None


def what(found: dict, entry: dict) -> str:
    """The claim, or the direction, in words."""
    if "text" in entry:
        return f"{entry['text']} ({entry['id']})"
    return f"{entry['label']} against {entry['base']}, {title(found, entry)} ({entry['table']}, {entry['eval_set']})"


def told(found: dict, entry: dict, side: dict) -> str:
    """A verdict's estimate with its interval: a difference, or a ratio."""
    if side["estimate"] is None:
        return ""
    signed, interval = entry.get("relation") != "at_least_share", side["interval"]
    return f"{number(found, entry, side['estimate'], interval, signed)} {between(found, entry, interval, signed)}"


def by_table(entries: list[dict]) -> list[tuple[str, dict]]:
    return [(f"{entry['table']}, {entry['eval_set']}", entry) for entry in entries]


def by_part(changes: list[dict]) -> list[tuple[str, dict]]:
    return [(change["part"], change) for change in changes]


def rows_table(head: list[str], lines: list[list[str]], widths: list[int | None]) -> str:
    return tabulate(lines, head, "simple", disable_numparse=True, maxcolwidths=widths)


def _moved_cells(found: dict) -> list[str]:
    cells = moved(found)
    measured = [e for e in cells if e["verdict"] in (HIGHER, LOWER)]
    parts = []
    for place, entries in grouped(by_table(measured[:MOST_CELLS])).items():
        lines = []
        for e in entries:
            both = [number(found, e, e[side]["value"], e[side]["interval"]) for side in "ab"]
            gap = [number(found, e, e["difference"], e["interval"], True), between(found, e, e["interval"], True)]
            lines.append([e["label"], title(found, e), *both, *gap])
        head = ["Row", "Column", "A", "B", "B - A", "95 % interval"]
        parts.append(f"{place}\n{rows_table(head, lines, [30, 15, None, None, None, None])}")
    if parts:
        parts.insert(0, "Cells that are higher or lower in B, the clearest first")
    if len(measured) > MOST_CELLS:
        parts.append(f"... and {len(measured) - MOST_CELLS} more; --out and --json have all.")
    for verdict, missing in ((ONLY_A, "b_missing"), (ONLY_B, "a_missing")):
        rows = grouped(
            ((e["table"], e["eval_set"], e["label"], e[missing]), title(found, e))
            for e in cells
            if e["verdict"] == verdict
        )
        lines = [f"{table}, {eval_set}, {label} ({why}): {', '.join(titles)}"
                 for (table, eval_set, label, why), titles in rows.items()]  # fmt: skip
        if lines:
            parts.append(f"Cells {verdict}\n" + _wrapped(lines, "  - "))
    return parts


def _config(config: dict) -> list[str]:
    parts = []
    for part, changes in grouped(by_part(config["changes"])).items():
        lines = []
        for change in changes:
            records = f" ({where(change['records'], config['records_compared'])})" if change["records"] else ""
            one, other = shown(change["a"], change["b"]), shown(change["b"], change["a"])
            lines.append(f"{change['key']}: {one} -> {other}{records}")
        parts.append(f"{PARTS[part]}\n" + _wrapped(lines, "  - "))
    for side in "ab":
        if only := config[f"records_only_in_{side}"]:
            more = [f"and {len(only) - MOST_CELLS} more"] if len(only) > MOST_CELLS else []
            parts.append(f"Records only in {side.upper()}\n" + _wrapped([*only[:MOST_CELLS], *more], "  - "))
    return [*parts, ONLY_NUMBERS] if config["records_compared"] else parts


def where(records: list[str], compared: dict[str, int]) -> str:
    """Which records a change is in: `all 103 records`, `all 42 run.json`, or some by name."""
    number, kinds = len(records), {kind_of(path) for path in records}
    if number > 1 and number == sum(compared.values()):
        return f"all {number} records"
    if number > 1 and number == sum(compared[kind] for kind in kinds):
        return f"all {number} {listed(sorted(kinds))}"
    more = f" and {number - MOST_RECORDS} more" if number > MOST_RECORDS else ""
    return f"{', '.join(records[:MOST_RECORDS])}{more}"


def _paper(found: dict) -> list[str]:
    parts = []
    if found["cells"]:
        off = [e for e in found["cells"]["entries"] if e["verdict"] in (HIGHER, LOWER)]
        parts += _tables("Cells that are not the paper's", off, PAPER_CELL, lambda e: _paper_cell(found, e))
    lines = [
        f"{what(found, e)}: {e['ours']} here, {told(found, e, e)}; {e['paper']} in the paper's cells"
        for e in found["claims"]["entries"]
        if e["verdict"] == DISAGREES
    ]
    parts.append("Claims that disagree\n" + (_wrapped(lines, "  - ") or "none"))
    off = [e for e in found["directions"]["entries"] if e["kind"] == DISAGREES]
    parts += _tables("Directions that disagree", off, PAPER_DIRECTION, lambda e: _paper_direction(found, e))
    rules = [found[part]["rule"] for part in ("cells", "directions", "claims") if found[part]]
    return [*parts, "How it is judged\n" + _wrapped((" ".join(rule.split()) for rule in rules), "  - ")]


def _tables(heading: str, entries: list[dict], head: list[str], line: Callable[[dict], list[str]]) -> list[str]:
    """A table for each table and eval set."""
    parts = [heading if entries else f"{heading}\nnone"]
    for place, group in grouped(by_table(entries)).items():
        parts.append(f"{place}\n{rows_table(head, [line(e) for e in group], [30, 24, *[None] * (len(head) - 2)])}")
    return parts


def _paper_direction(found: dict, e: dict) -> list[str]:
    ours = number(found, e, e["difference"], e["interval"], True)
    return [e["label"], e["base"], title(found, e), e["paper"], ours, between(found, e, e["interval"], True)]


def _paper_cell(found: dict, e: dict) -> list[str]:
    ours = [number(found, e, e["ours"], e["interval"]), between(found, e, e["interval"])]
    return [e["label"], title(found, e), e["paper"], *ours, number(found, e, e["difference"], e["interval"], True)]


# ---- page ----


def to_html(found: dict) -> str:
    """One file that loads nothing; everything in it is escaped."""
    templates = environment(FOLDER, html=True)
    functions = (number, between, title, told, what, tree_line, summary, notes, moved, where, by_table, by_part)
    templates.globals |= {function.__name__: function for function in functions}
    templates.globals |= {"grouped": grouped, "PARTS": PARTS, "ONLY_NUMBERS": ONLY_NUMBERS}
    return templates.get_template("compare.html").render(found=found)
