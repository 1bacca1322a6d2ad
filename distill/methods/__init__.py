"""Methods: the folder is the registry. `ensemble.py` is the method `ensemble` in a config."""
