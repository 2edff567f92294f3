"""One self-contained HTML page: tables, plots as data, nothing fetched from anywhere."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2


def write_page(path: Path, **content: Any) -> None:
    """Fill the template `page.html.j2`; whatever stands in content is escaped.

    content: title, introduction, protocol and settings (text); beside them, where there are any, `table` with `plot`,
    `pictures`, `sections`, `shares`, `kept`, and `samples` or one `sample` (prompt and text; model, temperature and
    seed).
    """
    source = resources.files("hqlt.report").joinpath("page.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False)
    path.write_text(environment.from_string(source).render(**content), encoding="utf-8")
