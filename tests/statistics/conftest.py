"""The enumerated policy, once for all tests of estimators."""

import pytest

from support.enumerated import World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    return make_world()
