"""How texts are made from templates: what is not given is an error, and blocks leave no lines. Torch-free."""

from pathlib import Path

import jinja2


def environment(folder: Path, html: bool) -> jinja2.Environment:
    """Of the templates in a folder; html: all that is put into them is escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
    )
