"""Fixtures shared by all tests, and one hypothesis profile: the same draws in every run."""

import pytest
from hypothesis import HealthCheck, settings

import dynquant

settings.register_profile(
    "dynquant",
    derandomize=True,
    deadline=None,
    database=None,
    # The `isa` fixture holds for a whole test: no state passes from one example to the next.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("dynquant")


def _instruction_sets():
    facts = dynquant.info()
    yield from facts["available"]
    for name, reason in facts["declined"].items():
        if name not in facts["available"]:
            yield pytest.param(name, marks=pytest.mark.skip(reason=f"{name}: {reason}"))


@pytest.fixture(params=_instruction_sets())
def isa(request):
    """Runs the test once with each instruction set forced; those not available say why."""
    before = dynquant.info()["isa"]
    dynquant.set_isa(request.param)
    yield request.param
    dynquant.set_isa(before)
