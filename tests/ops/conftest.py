"""What the operators' tests share."""

import pytest


@pytest.fixture
def backend(request):
    """A backend, see backends.py; its kernels serve the operators during the test."""
    with request.param.serving() as backend:
        yield backend
