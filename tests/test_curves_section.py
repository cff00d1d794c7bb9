"""Section `curves` of report.html: every line figure as an element, its numbers as a table, nothing from elsewhere."""

import re
from html.parser import HTMLParser

import pytest
from synthetic import ROWS, table
from test_figures import built, run_of, tree

from eval.gains import gains
from eval.sections import curves as section
from eval.sections.page import Context
from pso import figures


class Tables(HTMLParser):
    """Cells of every table, and how often each tag was opened."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.tags, self.ids, self.inside = [], {}, [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.ids += [value for key, value in attrs if key == "id"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        self.inside = tag in ("th", "td")

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag):
        self.inside = False


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    context = Context(tree(results), results)
    return context, section.section(context)


def test_every_line_figure_is_there_once_with_ids_of_its_own(made):
    context, html = made
    page = Tables(html)
    names = [shown.name for shown in [*figures.curves(context.config), *figures.costs(context.config)]]
    assert names == ["curves_sdxl_dmd2", "cost_sdxl_dmd2"]
    assert page.tags["svg"] == page.tags["figcaption"] == page.tags["details"] == len(page.tables) == len(names)
    assert len(page.ids) == len(set(page.ids)) and {f"figure-{name}-title" for name in names} <= set(page.ids)
    assert "win_rates" not in html and "<img" not in html and "http" not in html


def test_the_first_and_last_probe_of_every_run_can_be_read(made):
    _, html = made
    head, *lines = Tables(html).tables[0]
    assert head == ["Run", "Update", "Reward", "KL per element", "Sharpness"]
    of = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert of["Naive fine-tune"]["Sharpness"] == "90 → 90" and of["Naive fine-tune"]["Reward"] == ""
    assert of["Online-PSO"] == {
        "Run": "Online-PSO", "Update": "0 → 10", "KL per element": "0 → 7.5", "Reward": "20 → 20", "Sharpness": "",
    }  # fmt: skip


def test_cost_and_scores_of_every_row_can_be_read(made):
    context, html = made
    head, *lines = Tables(html).tables[1]
    (shown,) = figures.costs(context.config)
    frame = gains(context.config, context.results, shown)
    assert head[:4] == ["Row", "UNet forwards", "Reward queries", "PickScore, pickapic_test"]
    assert [line[0] for line in lines] == [row.label for row in shown.rows]
    assert lines[0][1:3] == ["", ""] and lines[1][1:3] == ["100", "0"], "nothing was tuned in the untuned row"
    first = frame[(frame["metric"] == "pick_score") & (frame["eval_set"] == "pickapic_test")]
    for line, (_, cell) in zip(lines, first.iterrows(), strict=True):
        value, low, high = map(float, re.findall(r"-?[\d.]+", line[3]))
        assert (value, low, high) == pytest.approx((cell["value"], cell["low"], cell["high"]), abs=0.006)


def test_a_run_without_probes_stands_without_numbers(tmp_path):
    context = Context(tree(tmp_path), tmp_path)
    (run_of(context.config, tmp_path, "pso_offline") / "train.jsonl").unlink()
    head, *lines = Tables(section.section(context)).tables[0]
    assert next(line for line in lines if line[0] == "Offline-PSO")[1:] == [""] * (len(head) - 1)


def test_the_same_results_give_the_same_section(made):
    context, html = made
    assert section.section(context) == html


def test_tables_without_tuned_rows_have_a_sentence(tmp_path):
    cfg = built(table_entries={"table1": table(rows=[ROWS[0], ROWS[2]], extra_rows=[])})
    assert section.section(Context(cfg, tmp_path)) is None and section.WHY_NONE.endswith(".")
