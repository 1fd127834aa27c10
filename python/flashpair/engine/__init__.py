"""Pairs of anchors and references: sorted once, then reduced by the backend that `dispatch` chose."""
