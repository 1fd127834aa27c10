"""`python -m tests.ptx [quick] [words ...]`: a JSON line for each case, of those whose names hold all the words.

`python -m tests.ptx trials [arch]`: small kernels that prove the executor. `python -m tests.ptx mutants [words ...]`:
which of the product's kernels' faults it finds, had they any.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def main(words: Sequence[str]) -> int:
    from . import cases, mutants, trials

    if "trials" in words:
        archs = [arch for arch in cases.ARCHS if arch in words] or cases.ARCHS
        return _report(record for arch in archs for record in trials.run(arch))
    if "mutants" in words:
        return _report(mutants.run([word for word in words if word != "mutants"]))
    chosen = cases.quick() if "quick" in words else cases.matrix()
    wanted = [word for word in words if word != "quick"]
    named = (case for case in dict.fromkeys(chosen) if all(word in str(case) for word in wanted))
    return _report(map(cases.run, named))


def _report(records: Iterable[dict[str, Any]]) -> int:
    failed = 0
    for record in records:
        failed += not record["good"]
        print(json.dumps(record), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
