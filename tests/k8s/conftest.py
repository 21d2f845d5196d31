"""These tests need what renders kustomizations, the one tool that no Python package brings."""

import pytest
from rendered import kustomize


@pytest.fixture(scope="session", autouse=True)
def _kustomize() -> None:
    if kustomize() is None:
        pytest.skip("neither kubectl nor kustomize is on this machine")
