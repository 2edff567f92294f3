"""The command line: `hqlt COMMAND`, one file a command."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the command."""
    from jsonargparse import auto_cli

    from hqlt._version import version
    from hqlt.cli.demo import demo

    try:
        auto_cli(
            {"demo": demo},
            args=arguments,
            prog="hqlt",
            description="Hybrid memory layers: one layer, two memories.",
            version=version,
            allow_abbrev=False,
        )
    except KeyboardInterrupt:
        sys.exit(130)
