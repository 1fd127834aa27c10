"""Command line: `python -m flashpair info` and `python -m flashpair check`."""

from __future__ import annotations

import argparse
import sys

from . import check, info


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flashpair", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is built, which implementations can run here, and why the others cannot")
    checked = commands.add_parser(
        "check", help="gradcheck and parity of every criterion, or of your own, and implementation on this machine"
    )
    checked.add_argument(
        "criterion", nargs="*", help="FILE.py:Name or module:Name, a Criterion of your own that Name(impl=...) makes"
    )
    given = parser.parse_args()
    if given.command == "info":
        return info.main()
    try:
        return check.main(given.criterion)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
