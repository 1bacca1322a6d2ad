"""Passes: the folder is the registry. `compress/passes/NAME.py` is the pass NAME of a recipe."""
