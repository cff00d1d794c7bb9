"""What every section of report.html works with: where results lie, and how HTML is made. No torch.

A section is a module with `TITLE` (its heading) and `section(context) -> str | None`: HTML that goes below an <h2>, or
None where these results have nothing for it, with `WHY_NONE`, a sentence that then stands in its place. Its template is
the file of the same name beside it. HTML comes from templates alone: Jinja escapes all that is put into them.
"""

import base64
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup

from pso.entries import Config
from pso.paths import scale_dir

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Context:
    config: Config
    results: Path

    @property
    def base(self) -> Path:
        return scale_dir(self.config.scale, self.results)

    def json(self, name: str):
        """The content of a file of the scale, as `claims.json`."""
        return json.loads((self.base / name).read_text())

    def table(self, name: str) -> pd.DataFrame:
        """tables/{name}.csv: a line per eval set and row."""
        return pd.read_csv(self.base / "tables" / f"{name}.csv", keep_default_na=True)

    def diff(self, name: str) -> dict | None:
        """tables/{name}.diff.json, where the paper has the table."""
        path = self.base / "tables" / f"{name}.diff.json"
        return json.loads(path.read_text()) if path.exists() else None


@cache
def environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["data_uri"] = data_uri
    return found


def render(template: str, **values) -> Markup:
    """A template of this folder, filled."""
    return Markup(environment().get_template(template).render(**values))


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Bytes as an address that holds them, so that the page loads nothing."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
