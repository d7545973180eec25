"""Warnings of the frameworks are theirs; ours are errors."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        # the later mark is looked at first
        item.add_marker(pytest.mark.filterwarnings("error:::cbp_fast"), append=False)
        item.add_marker(pytest.mark.filterwarnings("ignore"), append=False)
