"""`make demo`: handwritten digits from training to retrieval, and a short table of times."""
