"""Switching from other libraries. Nothing of them is imported before a function here is called."""
