"""Tests of what is known of NVIDIA's driver on a machine that has none."""

from pathlib import Path

import pytest

from moray.engine.platform import cuda_driver
from moray.engine.platform.cuda_driver import driver_version, explain_missing_cuda


def test_the_driver_is_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc = tmp_path / "version"
    monkeypatch.setattr(cuda_driver, "PROC", proc)
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.2.0",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build  (root@host)",
    ):
        proc.write_text(line)
        assert driver_version() == "535.104.05"
    assert "the NVIDIA driver is 535.104.05" in explain_missing_cuda()
