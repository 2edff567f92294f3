"""A race as a table and as bars."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from hqlt.bench.race import Row


def table(title: str, results: list[Row]) -> None:
    from hqlt.bench.gpu import CAPTION
    from hqlt.cli.bench import table_of

    Console(width=160).print(table_of(title, results, CAPTION))


def plot(title: str, results: list[Row], file: Path) -> None:
    """Milliseconds of each contestant, a panel for each thing that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [name for name, value in results[0].items() if isinstance(value, dict)]
    figure, panels = pyplot.subplots(1, len(measured), figsize=(6 * len(measured), 0.4 * len(results) + 1.5))
    for panel, what in zip([panels] if len(measured) == 1 else panels, measured, strict=True):
        names = [row["implementation"] for row in results]
        milliseconds = [row[what]["ms"] for row in results]
        panel.barh(names, milliseconds, color=["#c44" if "triton" in name else "#88a" for name in names])
        panel.invert_yaxis()
        panel.set_xlabel(f"{what}, ms")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
