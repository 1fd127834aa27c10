"""Pairs of anchors and references: sorted once, reduced by the backend that `dispatch` chose, differentiated."""
