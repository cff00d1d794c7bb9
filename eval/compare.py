"""Two trees of results side by side, or one against the paper: what differs, and what differs in how it was made.

    python -m eval.compare A B [--tables table1 ...] [--out FILE.html] [--json FILE] [--fail-on verdicts]

A and B: the folder of a scale (results/miniature), of all results (results, with --scale where it holds several), or
the word `paper` (eval/reference). Trees that hold only tables, diffs and claims will do. Differences are B - A, or
ours - the paper's.

Refused is what was not measured alike: other scorers (or two of one row in a tree), other prompts, noise or sampling.
A {table}.diff.json with other numbers than its {table}.csv is named and not used. Exit code: 0 no difference of the
kind that --fail-on names, 1 there is one, 2 not comparable, or nothing of that kind could be compared, or another
error. No torch.
"""

import argparse
import json
import signal
import sys
from pathlib import Path

from eval.compare_cells import HIGHER, LOWER, ONLY_A, ONLY_B, SAME, Cells, section
from eval.compare_config import changes
from eval.compare_paper import DISAGREES, against_paper
from eval.compare_same import DESPITE_CODE, SKIP, grouped, refusal
from eval.compare_text import ANYTHING, CELLS, KINDS, NOTHING, VERDICTS, nothing_compared, to_html, to_text
from eval.compare_trees import Tree, folder_of, names_of, read_tree
from eval.compare_verdicts import claims, directions
from eval.scores import metric_title
from eval.tables import decimals
from pso.config import CONFIG_DIR, load
from pso.entries import Config
from pso.provenance import UserError, atomic, sentences

PAPER = "paper"
NOT_COMPARABLE = 2


def compare(configs: dict[str, Config], a: Tree, b: Tree, skip: bool = False, despite_code: bool = False) -> dict:
    """Two trees; configs: scale -> the configuration at hand, for titles, units and where scores lie.

    skip: leave out what was not measured alike; despite_code: a scorer's code alone does not count as that.
    """
    if not set(a.tables) & set(b.tables):
        raise UserError(f"A has {', '.join(a.tables)} and B {', '.join(b.tables)}: no table that both have.")
    cells = Cells(configs, a, b, despite_code)
    groups = grouped(cells.hindered, cells.rows)
    if groups and not skip:
        raise refusal(groups, len(cells.left_out), cells.total)
    columns = {}
    for tree in (a, b):
        for table in tree.tables:
            columns |= _columns(configs[tree.scale], table, tree.metrics(table))
    return {
        "schema_version": 1,
        "kind": "trees",
        "a": _about(a),
        "b": _about(b),
        "columns": columns,
        "directions": directions(a, b, cells.left_out),
        "claims": claims(a, b, cells.left_out),
        "cells": section(cells),
        "config": changes(a, b),
        "left_out": {"cells": len(cells.left_out), "because": groups},
        "despite": grouped(cells.despite, cells.rows),
        "unchecked": {
            kind: {"what": list(found), "cells": len(set().union(*found.values()))}
            for kind, found in cells.unchecked.items()
        },
        "stale": cells.stale,
    }


def with_paper(config: Config, tree: Tree, side: str) -> dict:
    """A tree against the paper; side: which of A and B the tree is."""
    paper = {"name": "the paper", "scale": None, "caption": None, "tables": [], "claims": 0, "records": 0}
    either = {"A": _about(tree), "B": paper} if side == "A" else {"A": paper, "B": _about(tree)}
    columns = {}
    for table in tree.tables:
        columns |= _columns(config, table, tree.metrics(table))
    found = {"schema_version": 1, "kind": PAPER, "a": either["A"], "b": either["B"], "columns": columns}
    return found | against_paper(tree, side)


def _about(tree: Tree) -> dict:
    return {
        "name": tree.name,
        "scale": tree.scale,
        "caption": tree.caption,
        "tables": list(tree.tables),
        "claims": len(tree.claims or {}),
        "records": len(tree.records),
    }


def _columns(config: Config, table: str, metrics: list[str]) -> dict[str, dict]:
    """`table1.pick_score` -> its title, and digits after the point as the table prints it."""
    places = decimals(config, table)
    return {f"{table}.{m}": {"title": metric_title(config, m), "decimals": places.get(m, 4)} for m in metrics}


def differs(found: dict, kind: str) -> bool:
    """Whether there is a difference of a kind: `verdicts` is part of `cells`, and both are of `anything`."""
    if kind == NOTHING:
        return False
    if found["kind"] == PAPER:
        verdicts = [found[part]["counts"].get(DISAGREES, 0) for part in ("directions", "claims")]
        cells = [found["cells"]["counts"][verdict] for verdict in (HIGHER, LOWER)] if found["cells"] else []
        return any(verdicts) or (kind != VERDICTS and any(cells))
    if any(found[part]["changed"] or found[part]["only_in"] for part in ("directions", "claims")):
        return True
    cells, config = found["cells"], found["config"]
    if kind != VERDICTS and any(cells["counts"][verdict] for verdict in (HIGHER, LOWER, ONLY_A, ONLY_B)):
        return True
    if kind != ANYTHING:
        return False
    more = (config["changes"], config["records_only_in_a"], config["records_only_in_b"], found["left_out"]["cells"])
    return any(more) or cells["equal"] < cells["compared"]


def num_compared(found: dict, kind: str) -> int:
    """How many verdicts, or cells, a kind of difference could be seen in: such as both sides have.

    The paper's numbers are held against those of one scale alone: at others `cells` is verdicts too. A digit that
    differs, which is of `anything`, is seen without an interval.
    """
    if kind == VERDICTS or not found["cells"]:
        return found["directions"]["measured"] + found["claims"]["measured"]
    judged = sum(found["cells"]["counts"][verdict] for verdict in (SAME, HIGHER, LOWER))
    return judged + (found["cells"].get("not_judged", 0) if kind == ANYTHING else 0)


def run(args: argparse.Namespace) -> dict:
    """What the command compares, with the answer to --fail-on."""
    found = _compared(args)
    found |= {"fail_on": args.fail_on, "differs": differs(found, args.fail_on)}
    if args.fail_on != NOTHING and not found["differs"] and not num_compared(found, args.fail_on):
        raise nothing_compared(found, args.fail_on)
    return found


def _compared(args: argparse.Namespace) -> dict:
    given = {"A": args.a, "B": args.b}
    sides = [side for side, argument in given.items() if argument != PAPER]
    if not sides:
        raise UserError("A and B are both the paper; expected a folder of results as one of them.")
    folders = {side: folder_of(given[side], args.scale, side) for side in sides}
    names = dict(zip(sides, names_of(*folders.values()), strict=True))
    trees = {side: read_tree(folders[side], names[side], args.tables, side) for side in sides}
    configs = {tree.scale: load({"scale": tree.scale}, args.config_dir) for tree in trees.values()}
    if len(sides) == 1:
        (side,) = sides
        return with_paper(configs[trees[side].scale], trees[side], side)
    return compare(configs, trees["A"], trees["B"], args.skip_incomparable, args.despite_code)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--scale", help="which one, where a folder holds the results of several")
    parser.add_argument("--tables", nargs="+", metavar="TABLE", help="these alone, and their claims; default: all")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="everything as one page, beside the text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything for programs")
    parser.add_argument(
        "--fail-on", choices=KINDS, default=CELLS, metavar="KIND",
        help="what makes the exit code 1: nothing; verdicts (of directions and claims); cells (default: these, or a "
        "cell that is higher, lower or in one tree only); anything (these, or any digit, setting, code or input); 2 if "
        "nothing of that could be compared",
    )  # fmt: skip
    parser.add_argument(SKIP, action="store_true", help="leave out, and list, what was not measured alike")
    parser.add_argument(
        DESPITE_CODE, action="store_true", help="compare, and name, scores of a scorer whose code alone differs"
    )
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR, help="folder with the YAML files")
    return parser


def main() -> None:
    args = arguments().parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    with sentences("eval.compare", NOT_COMPARABLE):
        found = run(args)
        if args.json is not None:
            with atomic(args.json) as part:
                part.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
        if args.out is not None:
            with atomic(args.out) as part:
                part.write_text(to_html(found))
        print(to_text(found))
    sys.exit(1 if found["differs"] else 0)


if __name__ == "__main__":
    main()
