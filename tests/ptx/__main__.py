"""`python -m tests.ptx [quick] [words ...]`: a JSON line for each case, of those whose names hold all the words."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence


def main(words: Sequence[str]) -> int:
    from . import cases

    chosen = cases.quick() if "quick" in words else cases.matrix()
    wanted, failed = [word for word in words if word != "quick"], 0
    for case in dict.fromkeys(chosen):
        if all(word in str(case) for word in wanted):
            record = cases.run(case)
            failed += not record["good"]
            print(json.dumps(record), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
