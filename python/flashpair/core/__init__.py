"""The parts that every other folder uses: row reductions, problems in label order, similarities, checks of arguments.

This folder imports nothing else of flashpair.
"""
