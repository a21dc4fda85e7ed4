"""`python -m adakernels info | bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status."""
    parser = argparse.ArgumentParser(prog="adakernels", description="Kernels for dynamic video networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, what was built and which backends can run")
    commands.add_parser("bench", help="run the benchmark suites", add_help=False)
    arguments, rest = parser.parse_known_args(argv)

    if arguments.command == "bench":
        from adakernels import bench

        return bench.main(rest) or 0
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from adakernels import info

    print(info.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
