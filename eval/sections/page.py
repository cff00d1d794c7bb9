"""What every section of report.html works with: where results lie, and how HTML is made. No torch.

A section is a module with `TITLE` (its heading) and `section(context) -> str | None`: HTML that goes below an <h2>, or
None where these results have nothing for it, with `WHY_NONE`, a sentence that then stands in its place. Where no job
has left a record it is asked only if it is of WITHOUT_RUNS (eval/report.py). Its template is the file of the same name
beside it. HTML comes from templates alone: Jinja escapes all that is put into them.
"""

import base64
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from eval.cost import record_files
from eval.scores import ScoreFiles
from pso.entries import Config
from pso.paths import scale_dir
from pso.provenance import read_json
from pso.templates import environment

FOLDER = Path(__file__).resolve().parent
INLINE = (  # the Markdown that our sentences hold
    (r"`([^`]+)`", r"<code>\1</code>"),
    (r"\*\*(?! )([^*]+)(?<! )\*\*", r"<strong>\1</strong>"),
    (r"\*(?! )([^*]+)(?<! )\*", r"<em>\1</em>"),
)


@dataclass(frozen=True)
class Context:
    config: Config
    results: Path

    @property
    def base(self) -> Path:
        return scale_dir(self.config.scale, self.results)

    def json(self, name: str):
        """The content of a file of the scale, as `claims.json`."""
        return read_json(self.base / name)

    def has(self, name: str) -> bool:
        return (self.base / name).exists()

    def table(self, name: str) -> pd.DataFrame:
        """tables/{name}.csv: a line per eval set and row."""
        return pd.read_csv(self.base / "tables" / f"{name}.csv", keep_default_na=True)

    def diff(self, name: str) -> dict | None:
        """tables/{name}.diff.json, where the paper has the table."""
        return self.json(f"tables/{name}.diff.json") if self.has(f"tables/{name}.diff.json") else None

    @cached_property
    def scores(self) -> ScoreFiles:
        """Scores of every image, read once for all sections."""
        return ScoreFiles(self.config, self.results)

    @cached_property
    def records(self) -> dict[str, dict]:
        """Job -> the record it left, in the order of the DAG; of those that are there."""
        return {job: self.json(f"{job}.json") for job, path in self._record_files.items() if path.exists()}

    @cached_property
    def lost_records(self) -> list[str]:
        """Jobs whose record is not there."""
        return [job for job, path in self._record_files.items() if not path.exists()]

    @cached_property
    def _record_files(self) -> dict[str, Path]:
        return record_files(self.config, self.results)

    def not_there(self, name: str) -> str:
        """The sentence in place of what a file would have told."""
        return f"results/{self.config.scale}/{name} is not there; `snakemake --cores 2` makes it."


@cache
def templates() -> jinja2.Environment:
    found = environment(FOLDER, html=True)
    found.filters |= {"data_uri": data_uri, "inline": inline, "grouped": grouped, "capitalize_first": capitalize_first}
    return found


def render(template: str, **values) -> Markup:
    """A template of this folder, filled."""
    return Markup(templates().get_template(template).render(**values))


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Bytes as an address that holds them, so that the page loads nothing."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def inline(text: str) -> Markup:
    """A sentence of ours: `code`, *emphasis* and **strong** of Markdown, all else as it is."""
    html = str(escape(text))
    for pattern, replacement in INLINE:
        html = re.sub(pattern, replacement, html)
    return Markup(html)


def grouped(number: float) -> str:
    """A whole number with commas between its thousands."""
    return f"{number:,.0f}"


def capitalize_first(text: str) -> str:
    """With a capital first letter, all else as it is."""
    return text[:1].upper() + text[1:]
