"""``case``: every discovered recipe at every width it does; ``trained``: those that train. None is named here."""

import pytest
from conformance import CASES, TRAINED, Case


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """A recipe at one width."""
    return request.param


@pytest.fixture(params=TRAINED, ids=str)
def trained(request: pytest.FixtureRequest) -> Case:
    """A recipe that trains, at one width."""
    return request.param
