"""How anything is timed: cases, baselines, a worker process for each variant, checks before times, reports, plots."""
