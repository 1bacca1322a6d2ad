"""The order of the suite."""


def pytest_collection_modifyitems(items):
    """The longest file first, so that the other process works through the rest beside it."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")
