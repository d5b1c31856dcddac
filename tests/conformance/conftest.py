"""``case``: every discovered recipe at every width it does; ``trained``: those that train. None is named here."""

import pytest
from conformance import CASES, TRAINED, Case


def _name(case: Case) -> str:
    return f"{case.recipe}-{case.bits:g}"


@pytest.fixture(params=CASES, ids=_name)
def case(request: pytest.FixtureRequest) -> Case:
    """A recipe at one width."""
    return request.param


@pytest.fixture(params=TRAINED, ids=_name)
def trained(request: pytest.FixtureRequest) -> Case:
    """A recipe that trains, at one width."""
    return request.param
