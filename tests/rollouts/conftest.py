"""One step of TRL for each kind of file."""

import pytest

from support.trainer_logs import Trained, train


@pytest.fixture(scope="session")
def trained(checkpoint, tmp_path_factory) -> Trained:
    return train(checkpoint, tmp_path_factory.mktemp("one"), ["length"])


@pytest.fixture(scope="session")
def chatted(checkpoint, tmp_path_factory) -> Trained:
    return train(checkpoint, tmp_path_factory.mktemp("chat"), ["length"], chat=True)


@pytest.fixture(scope="session")
def with_two(checkpoint, tmp_path_factory) -> Trained:
    return train(checkpoint, tmp_path_factory.mktemp("two"), ["length", "first_one"])


@pytest.fixture(scope="session")
def with_none(checkpoint, tmp_path_factory) -> Trained:
    return train(checkpoint, tmp_path_factory.mktemp("none"), ["partly"])
