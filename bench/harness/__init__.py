"""How anything is timed: cases, peers, probes in processes of their own, checks before times, reports, plots."""
