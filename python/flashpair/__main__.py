"""Command line: `python -m flashpair info`, `check` and `reality-check`."""

from __future__ import annotations

import argparse
import io
import sys

from . import __version__
from .tools import check, info
from .tools.reality_check import command


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flashpair", description=__doc__)
    parser.add_argument("--version", action="version", version=f"flashpair {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is built, which implementations can run here, and why the others cannot")
    checked = commands.add_parser(
        "check", help="gradcheck and parity of every criterion, or of your own, and implementation on this machine"
    )
    checked.add_argument(
        "criterion", nargs="*", help="FILE.py:Name or module:Name, a Criterion of your own that Name(impl=...) makes"
    )
    command.add(commands.add_parser(command.NAME, help=command.HELP, description=command.HELP))
    given = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):  # a terminal of few characters gets others, and no error after hours
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if given.command == "info":
        return info.main()
    try:
        return command.main(given) if given.command == command.NAME else check.main(given.criterion)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    except OSError as error:  # a full disk, a folder that may not be written: nothing was wrong with the arguments
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
