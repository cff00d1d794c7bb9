"""report.html without a browser: its content against the files that it is made from, counted and compared by hand."""

import csv
import json
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run, snakemake
from html_tree import Node, tree

from eval.report import SECTIONS, page
from eval.sections import cost, provenance, tables
from eval.sections.page import Context, inline
from pso.config import load
from pso.provenance import UserError
from pso.runs import where_results_lie

MINIATURE = ROOT / "results" / "miniature"
TABLES = ("table1", "table2", "table3", "table4", "style")
KIND = {"agrees": "agrees", "disagrees": "disagrees", "inconclusive": "open"}
CLAIM_KIND = {"holds": "agrees", "fails": "disagrees", "inconclusive": "open"}


@pytest.fixture(scope="module")
def committed() -> Node:
    """The page of the results that the repository holds: tables and claims, no records."""
    return tree(page(Context(load({"scale": "miniature"}), ROOT / "results")))


def lines_of(name: str) -> list[dict]:
    with open(MINIATURE / "tables" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def diff_of(name: str) -> dict:
    path = MINIATURE / "tables" / f"{name}.diff.json"
    return json.loads(path.read_text()) if path.exists() else {"cells": [], "directions": []}


def by_place(entries: list[dict]) -> dict:
    return {(entry["eval_set"], entry["label"], entry["metric"]): entry for entry in entries}


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def reference_of(name: str) -> dict:
    path = ROOT / "eval" / "reference" / f"{name}.csv"
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return by_place(list(csv.DictReader(file)))


def cells_of(page: Node, name: str) -> dict[tuple[str, str, str], Node]:
    """(eval set, label, head of the column) -> cell, of both of a table's grids; each must stand once."""
    found = {}
    for grid in page.one("section", id=f"table-{name}").all("table", of="cells"):
        heads = [th.text.removeprefix("† ") for th in grid.one("thead").all("th")]
        for body in grid.all("tbody"):
            eval_set = body.one("th", scope="rowgroup").text.partition(" ")[0]
            for row in body.all("tr"):
                if label := row.all("th", scope="row"):
                    for head, cell in zip(heads[2:], row.all("td")[1:], strict=True):
                        place = eval_set, label[0].text.removeprefix("† "), head
                        assert place not in found, f"{place} stands twice"
                        found[place] = cell
    return found


# ---- tables ----


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_stands_once_with_number_interval_verdict_and_the_papers(committed, name):
    settings = yaml.safe_load((ROOT / "workflow" / "config" / "tables.yaml").read_text())[name]
    entries = yaml.safe_load((ROOT / "workflow" / "config" / "metrics.yaml").read_text())
    found, printed = cells_of(committed, name), reference_of(name)
    directions = by_place(diff_of(name)["directions"])
    metrics = [*settings["metrics"], *settings.get("extra_metrics", [])]
    assert len(found) == len(lines_of(name)) * len(metrics)
    decimals = {m: max([int(c["decimals"]) for p, c in printed.items() if p[2] == m] or [-1]) for m in metrics}
    for line in lines_of(name):
        for metric in metrics:
            place = line["eval_set"], line["label"], metric
            cell = found[(*place[:2], entries[metric]["title"])]
            check_number(cell, line, metric, decimals[metric] if decimals[metric] >= 0 else entries[metric]["decimals"])
            check_verdict(cell, directions.get(place))
            check_paper(cell, printed.get(place))


def check_number(cell: Node, line: dict, metric: str, decimals: int) -> None:
    text = cell.text.partition("[")[0]
    if line[metric] == "":
        assert text.startswith("–") and not cell.all(of="interval")
        return
    assert re.match(r"[−\d.]+", text)[0] == f"{float(line[metric]):z.{decimals}f}".replace("-", "−")
    ends = [number(end) for end in cell.one(of="interval").text.strip("[]").split(", ")]
    for end, wanted in zip(ends, (line[f"{metric}_low"], line[f"{metric}_high"]), strict=True):
        width = float(line[f"{metric}_high"]) - float(line[f"{metric}_low"])
        assert abs(end - float(wanted)) <= max(0.05 * width, 0.51 * 10.0**-decimals * (width == 0), 1e-8)


def check_verdict(cell: Node, direction: dict | None) -> None:
    if direction is None:  # a base row, or no cell of the paper's
        assert not cell.all(of="verdict")
        return
    mark = cell.one(of="verdict")
    assert mark.classes[1] == KIND[direction["verdict"]] and mark.text.strip() == KIND[direction["verdict"]]
    assert mark.one(aria_hidden="true").children == [{"agrees": "✓", "disagrees": "✗", "open": "○"}[mark.classes[1]]]
    assert cell.one(of="side").text == f"; paper {direction['paper']}"


def check_paper(cell: Node, printed: dict | None) -> None:
    if printed is None:
        assert not cell.all(of="paper")
        return
    assert cell.one(of="paper").text.startswith(f"paper {printed['value']}, not comparable")
    assert len(cell.all("a")) == bool(printed["note"])


def test_doubts_lead_to_their_notes(committed):
    for name in TABLES[:4]:
        section = committed.one("section", id=f"table-{name}")
        notes = {li.attributes["id"]: li.text for li in section.all("li") if "id" in li.attributes}
        for place, printed in reference_of(name).items():
            if printed["note"]:
                title = yaml.safe_load((ROOT / "workflow/config/metrics.yaml").read_text())[place[2]]["title"]
                link = cells_of(committed, name)[(*place[:2], title)].one("a")
                assert printed["note"] in notes[link.attributes["href"].removeprefix("#")]


def test_best_and_marks_are_those_of_the_markdown(committed):
    for name in TABLES:
        markdown = (MINIATURE / "tables" / f"{name}.md").read_text()
        grids = committed.one("section", id=f"table-{name}").all("table", of="cells")
        rows = [line for line in markdown.splitlines() if line.startswith("|")]
        assert sum(len(grid.all("strong")) for grid in grids) == sum(row.count("**") // 2 for row in rows)
        assert sum(len(grid.all(title="this row was trained on this judge or a copy of it")) for grid in grids) == sum(
            row.count("‡") for row in rows
        )
        labels = [th.text for th in grids[0].all("th", scope="row")]
        listed = [row.split("|")[1].strip() for row in rows]
        assert labels == [
            label for label in listed if label not in ("Method", "*not in the paper:*") and label[0] != ":"
        ]


def test_at_a_comparable_scale_a_cell_has_its_own_verdict(tmp_path):
    """Scale `paper` with the miniature's numbers: what matters is which words stand in a cell."""
    folder = tmp_path / "paper" / "tables"
    folder.mkdir(parents=True)
    shutil.copy(MINIATURE / "tables" / "table3.csv", folder)
    found = diff_of("table3") | {"comparable": True, "cell_counts": {"same": 7, "higher": 1, "lower": 1}}
    for entry, verdict in zip(found["cells"], ["higher", "lower", *["same"] * 7], strict=True):
        entry["verdict"] = verdict
    (folder / "table3.diff.json").write_text(json.dumps(found))
    html = tree(tables.section(Context(load({"scale": "paper", "tables": ["table3"]}), tmp_path)))
    marks = Counter(mark.text.strip() for mark in html.one("table", of="cells").all(of="verdict"))
    directions = Counter(KIND[entry["verdict"]] for entry in found["directions"])
    assert marks == Counter({"same": 7, "higher": 1, "lower": 1}) + directions
    assert "not comparable" not in html.text and "off the paper's" in html.text


# ---- claims ----


def test_every_claim_stands_once_with_its_verdict_and_numbers(committed):
    found = json.loads((MINIATURE / "claims.json").read_text())
    items = {li.attributes["id"]: li for li in committed.all("li", of="claim")}
    assert sorted(items) == sorted(f"claim-{entry['id']}" for entry in found) and len(items) == len(found)
    for entry in found:
        item = items[f"claim-{entry['id']}"]
        assert item.attributes["data-kind"] == entry["verdict"]
        mark = item.one(of="verdict")
        assert (mark.text.strip(), mark.classes[1]) == (entry["verdict"], CLAIM_KIND[entry["verdict"]])
        for text in (entry["text"], entry["source"], entry["left"], entry["right"], entry["scorer"]["digest"]):
            assert text in item.text
        assert f"p {entry['p_value']:.4f}" in item.text and f"Holm’s p {entry['p_value_holm']:.4f}" in item.text
        assert f"left above on {entry['win_rate']:.1%}" in item.text and f"n {entry['n']:,}" in item.text
        assert f"cells: {entry['paper']['verdict']}" in item.text
        assert ("no independent evidence" in item.text) == entry["is_training_reward"]
        assert (entry["remark"] or "").lower() in item.text.lower()
        low, high = (number(end) for end in re.search(r"interval \[(.+?), (.+?)\]", item.text).groups())
        assert low == pytest.approx(entry["interval"][0], abs=0.05 * (high - low) + 1e-4)
        assert number(item.one("strong").text) == pytest.approx(entry["estimate"], abs=0.05 * (high - low) + 1e-4)


def test_what_the_paper_contradicts_itself_in_is_listed(committed):
    found = json.loads((MINIATURE / "claims.json").read_text())
    false = [f"#claim-{entry['id']}" for entry in found if entry["paper"]["verdict"] == "does not hold"]
    listed = committed.one("section", id="false-in-paper").all("a")
    assert [link.attributes["href"] for link in listed] == false and len(false) > 0


def test_an_unmeasured_claim_says_why(tmp_path):
    (tmp_path / "miniature").mkdir()
    found = json.loads((MINIATURE / "claims.json").read_text())[:1]
    found[0] |= dict.fromkeys(("estimate", "interval", "p_value", "p_value_holm"))
    found[0] |= {"verdict": "inconclusive", "reason": "row SDXL: not built yet", "n": 0}
    (tmp_path / "miniature" / "claims.json").write_text(json.dumps(found))
    whole = tree(page(Context(load({"scale": "miniature"}), tmp_path)))
    item = whole.one("li", of="claim")
    assert "Row SDXL: not built yet." in item.text and "Holm" not in item.text
    assert "1 of the inconclusive ones could not be measured" in whole.one("section", id="overview").text
    assert "1 of the inconclusive ones could not be measured" in whole.one("section", id="claims").text


# ---- the page ----


def test_the_overview_counts_what_the_files_hold(committed):
    overview = committed.one("section", id="overview").text
    verdicts = Counter(entry["verdict"] for name in TABLES for entry in diff_of(name)["directions"])
    claims = Counter(entry["verdict"] for entry in json.loads((MINIATURE / "claims.json").read_text()))
    assert f"Of {verdicts.total()} directions" in overview
    for text in (
        f"{verdicts['agrees']} agree",
        f"{verdicts['disagrees']} disagree",
        f"{verdicts['inconclusive']} open",
    ):
        assert text in overview
    assert f"Of {claims.total()} sentences" in overview
    false = [e for e in json.loads((MINIATURE / "claims.json").read_text()) if e["paper"]["verdict"] == "does not hold"]
    assert f"{len(false)} of all contradict" in overview
    assert f"{claims['holds']} hold" in overview and f"{claims['fails']} fail" in overview


def check_names(found: Node) -> None:
    """Every id once, and every link within the page leads somewhere."""
    ids = [node.attributes["id"] for node in found.walk() if "id" in node.attributes]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    hrefs = [n.attributes.get(key) or "" for n in found.walk() for key in ("href", "xlink:href")]
    assert {href[1:] for href in hrefs if href.startswith("#")} <= set(ids)


def test_sections_stand_in_order_and_links_within_the_page_lead_somewhere(committed):
    names = [module.__name__.rpartition(".")[2] for module in SECTIONS]
    assert [link.attributes["href"] for link in committed.one("nav").all("a")] == [f"#{name}" for name in names]
    assert [node.attributes["id"] for node in committed.one("main").children if isinstance(node, Node)] == names
    check_names(committed)


ADDRESSES = ("src", "srcset", "href", "xlink:href", "data", "poster", "action", "data-src")


def is_inside(node: Node, name: str, value: str) -> bool:
    if node.tag == "a":
        return value.startswith(("#", "https://arxiv.org/", "https://github.com/"))
    return value.startswith(("data:", "#"))


def check_alone(found: Node) -> None:
    """Nothing is loaded from anywhere."""
    named = [(n, name, n.attributes[name]) for n in found.walk() for name in ADDRESSES if n.attributes.get(name)]
    assert [value for node, name, value in named if not is_inside(node, name, value)] == []
    assert not found.all("link") and not found.all("iframe")
    policy = found.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    code = "".join(child for kind in ("style", "script") for node in found.all(kind) for child in node.children)
    assert not re.search(r"https?:|url\((?!#)|@import|fetch\(|XMLHttpRequest|eval\(", code)


def test_nothing_is_loaded_from_anywhere(committed):
    check_alone(committed)


def test_the_page_is_the_same_byte_for_byte():
    config = load({"scale": "miniature"})
    assert page(Context(config, ROOT / "results")) == page(Context(config, ROOT / "results"))


HOSTILE = "<script>alert(1)</script> & \"'"


def test_it_is_the_first_that_make_names():
    assert where_results_lie(load({"scale": "miniature"})).splitlines()[0].endswith("results/miniature/report.html")


def test_what_files_hold_is_escaped(tmp_path):
    """A row's label, a reason and a note that look like code stay text."""
    folder = tmp_path / "miniature" / "tables"
    folder.mkdir(parents=True)
    rows = [{"label": HOSTILE, "steps": 4, "missing": HOSTILE}]
    override = {"rows": rows, "extra_rows": [], "extra_metrics": [], "metrics": ["clip_score"], "caption": HOSTILE}
    config = load({"scale": "miniature", "tables": {"style": override}})
    object.__setattr__(config, "tables", ["style"])
    head = "eval_set,label,model,method,steps,clip_score,clip_score_low,clip_score_high,num_prompts,num_images,num_runs"
    with open(folder / "style.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [
                [*head.split(","), "dropped", "status"],
                ["pickapic_test", HOSTILE, "", "", 4, *[""] * 6, "", HOSTILE],
            ]
        )
    html = tables.section(Context(config, tmp_path))
    found = tree(html)
    assert not found.all("script") and "alert(1)" in html
    row = found.one("table", of="cells").one("th", scope="row")
    assert row.text == f"{HOSTILE}not made: {HOSTILE}" and HOSTILE in found.one("h3").text


def test_sentences_may_hold_code_and_emphasis_and_no_more():
    assert inline("`a<b` *or* **c** <i>") == "<code>a&lt;b</code> <em>or</em> <strong>c</strong> &lt;i&gt;"
    assert inline("2 * 3 * 4") == "2 * 3 * 4"


def test_without_results_every_section_says_what_to_do(tmp_path):
    found = tree(page(Context(load({"scale": "miniature"}), tmp_path)))
    for module in SECTIONS:
        text = found.one("section", id=module.__name__.rpartition(".")[2]).text
        assert "snakemake" in text or "not known" in text, module.__name__
    assert all(f"results/miniature/tables/{name}.csv is not there" in found.text for name in TABLES)


def half_made(results: Path) -> Context:
    """The committed tables beside the record of a single job."""
    shutil.copytree(MINIATURE / "tables", results / "miniature" / "tables")
    record = {"job": "hub", "code": {"commit": "c" * 40, "dirty": None}, "versions": {}, "inputs": []}
    record |= {"hardware": {"cpus": 2}, "cost": {"wall_s": 1.0, "cpu_s": 1.0}, "config_digest": "d"}
    (results / "miniature" / "hub").mkdir()
    (results / "miniature" / "hub" / "vae.json").write_text(json.dumps(record))
    return Context(load({"scale": "miniature"}), results)


def test_while_jobs_are_to_come_a_section_says_what_it_waits_for(tmp_path):
    text = page(half_made(tmp_path))
    found = tree(text)
    for name in ("grids", "curves", "wins", "categories"):
        said = found.one("section", id=name).text
        assert "jobs have left no record" in said and "results/miniature/preference/" in said, name
    assert found.one("section", id="table-table1").all("table") and "1 job" in found.one("section", id="cost").text
    assert str(tmp_path) not in text


def test_where_no_job_is_to_come_what_does_not_go_together_stops_the_page(tmp_path):
    context = half_made(tmp_path)
    vars(context)["lost_records"] = []
    with pytest.raises(UserError, match="holds no shard"):
        page(context)


def test_a_page_of_one_table_says_what_is_not_on_it():
    found = tree(page(Context(load({"scale": "miniature", "tables": ["style"]}), ROOT / "results")))
    assert "None of this page’s tables is in the paper" in found.one("section", id="overview").text
    assert "held against the paper yet" not in found.text and "table1, not on this page" in found.text
    check_names(found)


def test_a_table_of_other_settings_is_not_shown(tmp_path):
    folder = tmp_path / "miniature" / "tables"
    folder.mkdir(parents=True)
    text = (MINIATURE / "tables" / "table3.csv").read_text()
    (folder / "table3.csv").write_text(text.replace("PSO w/ SDXL-Turbo", "PSO with SDXL-Turbo"))
    found = tree(tables.section(Context(load({"scale": "miniature", "tables": ["table3"]}), tmp_path)))
    assert "table3.csv lacks PSO w/ SDXL-Turbo, so it is of other settings" in found.text
    assert not found.all("table")


@pytest.mark.parametrize(
    ("there", "instead", "said"),
    [("pso_offline,4", "pso_online,4", "as pso_online and not"), (",4,", ",8,", "as 8 and not 4")],
)
def test_a_row_of_another_method_or_grid_under_the_same_label_is_not_shown(tmp_path, there, instead, said):
    folder = tmp_path / "miniature" / "tables"
    folder.mkdir(parents=True)
    text = (MINIATURE / "tables" / "table1.csv").read_text()
    assert there in text
    (folder / "table1.csv").write_text(text.replace(there, instead))
    found = tree(tables.section(Context(load({"scale": "miniature", "tables": ["table1"]}), tmp_path)))
    assert said in found.text and "so it is of other settings" in found.text and not found.all("table")


def test_a_table_that_is_not_held_against_the_paper_yet_says_so_and_how(tmp_path):
    folder = tmp_path / "miniature" / "tables"
    folder.mkdir(parents=True)
    shutil.copy(MINIATURE / "tables" / "table2.csv", folder)
    found = tree(tables.section(Context(load({"scale": "miniature", "tables": ["table2"]}), tmp_path)))
    assert "Nothing is held against the paper yet: results/miniature/tables/table2.diff.json is not there" in found.text
    assert "The paper has no such table" not in found.text and "not comparable" in found.text
    assert found.all("table")


def test_verdicts_of_an_older_table_are_not_shown(tmp_path):
    folder = tmp_path / "miniature" / "tables"
    folder.mkdir(parents=True)
    shutil.copy(MINIATURE / "tables" / "table2.csv", folder)
    told = diff_of("table2")
    told["cells"][3]["ours"] += 0.01
    (folder / "table2.diff.json").write_text(json.dumps(told))
    found = tree(tables.section(Context(load({"scale": "miniature", "tables": ["table2"]}), tmp_path)))
    name = f"{told['cells'][3]['label']}, {told['cells'][3]['eval_set']}, {told['cells'][3]['metric']}"
    assert f"table2.diff.json is older than the table (1 cells differ, as {name})" in found.text
    assert not found.all(of="verdict") and "directions against a base row" not in found.text


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "miniature").mkdir()
    (tmp_path / "miniature" / "claims.json").write_text("{")
    with pytest.raises(UserError, match="claims.json is no JSON"):
        page(Context(load({"scale": "miniature"}), tmp_path))


# ---- cost and provenance ----

RECORD = {
    "job": "tune",
    "hardware": {"machine": "x86_64", "cpus": 2, "threads": 1},
    "cost": {"wall_s": 1800.0, "cpu_s": 900.0, "unet_forwards": 1200, "reward_queries": 7, "peak_rss_gib": 1.5},
    "processes": 4,
}
GPU = RECORD | {"hardware": RECORD["hardware"] | {"gpus": ["NVIDIA H200"] * 4}}


def test_gpu_hours_are_processes_times_wall_time_of_jobs_with_a_gpu():
    frame = cost.costs({"a/run": GPU, "b/run": GPU | {"processes": 1}, "c/run": RECORD}).set_index("job")
    assert frame.loc["a/run", "gpu_hours"] == 2.0 and frame.loc["b/run", "gpu_hours"] == 0.5
    assert frame["gpu_hours"].isna().to_dict() == {"a/run": False, "b/run": False, "c/run": True}


def test_inputs_are_grouped_by_repository_and_counted():
    one = {"repo": "a/b", "file": "x", "sha256": "1" * 64}
    records = {
        "j": {"inputs": [one, {"file": "cache/y", "sha256": "2" * 64, "made_from": "3"}]},
        "k": {"inputs": [one]},
    }
    records["l"] = {"inputs": [one | {"sha256": "4" * 64, "revision": "5" * 40}]}
    found = provenance.inputs(records)
    assert found["a/b"] == [
        {"file": "x", "sha": "1" * 12, "revision": "", "jobs": 2},
        {"file": "x", "sha": "4" * 12, "revision": "5" * 40, "jobs": 1},
    ]
    assert found["made here"] == [{"file": "cache/y", "sha": "2" * 12, "revision": "", "jobs": 1}]


def test_nested_facts_become_flat_words():
    assert provenance.flat({"a": {"b": [1, 2], "c": None}, "d": True}) == {"a.b": "1, 2", "a.c": "none", "d": "yes"}


# ---- of a whole run ----


def test_the_page_of_a_whole_run_has_every_job_and_scorer(smoke):
    base = smoke / "results" / "smoke"
    text = (base / "report.html").read_text()
    found = tree(text)
    assert text == page(Context(load({"scale": "smoke"}), smoke / "results"))
    jobs = [line.split("|")[1].strip() for line in (base / "cost.md").read_text().split("\n\n")[1].splitlines()[2:]]
    listed = [
        row.one("th", scope="row").text for t in found.all("table", of="jobs") for row in t.one("tbody").all("tr")
    ]
    assert sorted(listed) == sorted(jobs) and len(jobs) > 80
    assert "No GPU" in found.one("section", id="cost").text
    of_it = found.one("section", id="provenance").text
    for path in base.glob("preference/*/scores.json"):
        for spec in json.loads(path.read_text())["specs"].values():
            assert all(sha[:12] in of_it for sha in spec.get("files", {}).values())
    for path in base.glob("preference/*/*/seed0/run.json"):
        record = json.loads(path.read_text())
        assert record["config_digest"] in of_it and record["code"]["commit"] in of_it
    check_names(found)
    check_alone(found)
    assert str(smoke) not in text and str(Path.home()) not in text and len(text) < 15e6


def test_the_command_writes_the_page_and_says_where(smoke, tmp_path):
    for name in ("tables", "claims.json"):
        (tmp_path / "smoke").mkdir(exist_ok=True)
        (tmp_path / "smoke" / name).symlink_to(smoke / "results" / "smoke" / name)
    done = run("python", "-m", "eval.report", "--results", str(tmp_path), "--set", '{"scale": "smoke"}')
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "smoke" / "report.html"), done.stderr
    assert tree((tmp_path / "smoke" / "report.html").read_text()).one("title").text.startswith("PSO-bench")


def test_snakemakes_own_report_holds_all_that_is_marked(smoke, tmp_path):
    done = snakemake("--report", str(tmp_path / "report.zip"), cwd=smoke)
    assert done.returncode == 0, done.stderr[-2000:]
    names = Counter(Path(name).name for name in zipfile.ZipFile(tmp_path / "report.zip").namelist() if "/raw/" in name)
    wanted = {"report.html", "claims.md", *(f"{name}.{kind}" for name in TABLES for kind in ("csv", "md"))}
    wanted |= {f"{name}.diff.md" for name in TABLES[:4]}
    wanted |= {path.name for path in (smoke / "results" / "smoke" / "figures").glob("*.png")}
    assert wanted <= set(names) and set(names.values()) == {1}
