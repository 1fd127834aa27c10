"""Switching from other libraries, which are imported only when a function here is called."""
