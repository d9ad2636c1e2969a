import pytest
from megatron_processes import VERSIONS


@pytest.fixture(params=VERSIONS, scope="session")
def version(request):
    """The version of Megatron-Core that pip installs, and the newest."""
    if not VERSIONS[request.param]:
        pytest.skip(f"Megatron-Core is not there: {request.param}")
    return request.param
