"""Self-contained HTML pages with tables and inline plots; they load nothing from elsewhere."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2


def write_page(path: Path, **content: Any) -> None:
    """Fill the template `page.html.j2` and write the page. All content but plots is escaped.

    Args:
        path: the HTML file.
        content: `title`, `introduction`, `protocol` and `settings` (text); optionally `table` with `plot`, `pictures`,
            `sections`, `shares`, `kept`, and `samples` or a single `sample` (a mapping with `prompt` and `text`, and
            optionally `model`, `temperature` and `seed`).
    """
    source = resources.files("hqlt.report").joinpath("page.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False)
    path.write_text(environment.from_string(source).render(**content), encoding="utf-8")
