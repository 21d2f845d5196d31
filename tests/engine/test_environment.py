"""The clash with the Hugging Face package of the same name, with real package metadata on the path."""

from pathlib import Path

import pytest

import kernels
from engine.environment import check_environment
from engine.errors import UserError


def test_this_environment_is_fine_and_our_package_has_no_version() -> None:
    check_environment()
    assert not hasattr(kernels, "__version__"), "transformers would take us for the Hugging Face package"


def test_an_installed_kernels_distribution_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"the package kernels 0\.18\.2 is installed"):
        check_environment()
