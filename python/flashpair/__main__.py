"""Command line: `python -m flashpair info` and `python -m flashpair check`."""

from __future__ import annotations

import argparse
import sys

from . import check, info


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flashpair", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is built, which implementations can run here, and why the others cannot")
    commands.add_parser("check", help="gradcheck and parity of every criterion and implementation on this machine")
    return {"info": info.main, "check": check.main}[parser.parse_args().command]()


if __name__ == "__main__":
    sys.exit(main())
