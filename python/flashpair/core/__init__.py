"""What every other folder speaks: a row reduction, a problem in label order, similarities, checks of arguments.

Imports nothing else of flashpair.
"""
