"""Checks of cells that share the training of another cell and change the model for the test."""

from __future__ import annotations

import json
from pathlib import Path

from hqlt.train.grid import Cell, Result, save_result


def switched_after_training(switched: Cell, plain: Cell, folder: Path) -> tuple[Result, Result]:
    """Check that a switched cell has the same test whether the plain cell has run (`both`) or not (`alone`).

    It must not train if the plain cell has run. Returns the results of both.
    """

    def run(cell: Cell, place: Path) -> tuple[int, Result]:
        *progress, result = cell.run(place, "cpu")
        (place / "cells").mkdir(exist_ok=True)
        assert isinstance(result, Result)
        save_result(place, result)
        return len(progress), result

    trained_alone, alone = run(switched, folder / "alone")
    _, other = run(plain, folder / "both")
    trained, result = run(switched, folder / "both")
    assert trained_alone and not trained
    for mine, theirs in ((result.fit.test, alone.fit.test), (result.fit.validation, other.fit.validation)):
        assert json.dumps(mine._asdict()) == json.dumps(theirs._asdict())
    assert result.seconds == other.seconds
    return result, other
