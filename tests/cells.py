"""What holds for every cell of a study that is trained as another and switched for the test."""

from __future__ import annotations

import json
from pathlib import Path

from hqlt.train.grid import Cell, Result, save_result


def switched_after_training(switched: Cell, plain: Cell, folder: Path) -> tuple[Result, Result]:
    """It is tested alike whether the other one has a result already (in `both`) or not (in `alone`), and then trains
    nothing. → the results of both."""

    def run(cell: Cell, place: Path) -> tuple[int, Result]:
        *told, result = cell.run(place, "cpu")
        (place / "cells").mkdir(exist_ok=True)
        assert isinstance(result, Result)
        save_result(place, result)
        return len(told), result

    trained_alone, alone = run(switched, folder / "alone")
    _, other = run(plain, folder / "both")
    trained, result = run(switched, folder / "both")
    assert trained_alone and not trained
    for mine, theirs in ((result.fit.test, alone.fit.test), (result.fit.validation, other.fit.validation)):
        assert json.dumps(mine._asdict()) == json.dumps(theirs._asdict())
    assert result.seconds == other.seconds
    return result, other
