"""Fixtures of the tests on several processes."""

import layout_cases
import pytest
from processes import run


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """As each of the processes has."""


@pytest.fixture(scope="module")
def trained(request):
    """`trained(case)`: what its training shows on each process. The module's cases of one mesh share a start."""
    tested = [item for item in request.session.items if item.module is request.module and "case" in item.fixturenames]
    cases = list(dict.fromkeys(item.callspec.params["case"] for item in tested))
    found = {}

    def of(case):
        if case not in found:
            together = [c for c in cases if (c.mesh, c.engine) == (case.mesh, case.engine)]
            by_rank = run(case.world, layout_cases.train_all, together)
            found.update(zip(together, zip(*by_rank, strict=True), strict=True))
        return found[case]

    return of
