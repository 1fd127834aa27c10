"""What is measured, a module a question; `python -m bench STUDY` runs one."""
