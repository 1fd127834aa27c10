"""The evaluation protocol of A Metric Learning Reality Check (Musgrave et al., ECCV 2020), for any losses and data.

`python -m flashpair reality-check` is its command line. `run` does the same from your own program.
"""

from .data import Data, load, partitions
from .losses import LOSSES, Candidate, Range, candidate
from .protocol import Protocol
from .study import Outcome, run

__all__ = ["LOSSES", "Candidate", "Data", "Outcome", "Protocol", "Range", "candidate", "load", "partitions", "run"]
