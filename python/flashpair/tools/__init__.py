"""The command line: `info`, `check`, and the protocol of A Metric Learning Reality Check."""
