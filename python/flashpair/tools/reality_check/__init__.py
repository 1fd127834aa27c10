"""The evaluation protocol of A Metric Learning Reality Check (Musgrave et al., ECCV 2020), for any losses and data.

`python -m flashpair reality-check` is its command line; `run` does the same for a program of one's own.
"""

from .data import Data, load, partitions
from .losses import LOSSES, Candidate, Range, candidate
from .protocol import Protocol
from .study import Outcome, run

__all__ = ["LOSSES", "Candidate", "Data", "Outcome", "Protocol", "Range", "candidate", "load", "partitions", "run"]
