"""The ``kexa`` command."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="kexa")
    commands = parser.add_subparsers(dest="command", required=True)
    notebooks = commands.add_parser("notebooks", help="build the .ipynb pairs from the .py sources")
    notebooks.add_argument("--build", action="store_true", required=True)
    parser.parse_args(arguments)
    from kexa import pairs

    for path in pairs.build():
        print(f"wrote notebooks/{path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
