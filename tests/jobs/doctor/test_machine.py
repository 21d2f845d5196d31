"""Conditions of a machine that can be made here: limits, small disks, variables, old packages."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest
from doctor_run import ask_section
from small_disk import SmallDisk, small_disk

from moray.jobs.doctor.places import file_system, nearest_folder, probe

TINY_GROUP = Path("/sys/fs/cgroup/memory")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(4096, "ok", marks=pytest.mark.slow),
        (256, "warning"),
        pytest.param(64, "problem", marks=pytest.mark.slow),
    ],
)
def test_open_files(files: int, expected: str) -> None:
    found, words = ask_section("Ray", before=("prlimit", f"--nofile={files}:{files}")).verdict_and_text(
        "Ray", "open files"
    )
    assert found == expected and words.startswith(f"{files:,} may be open in a process")


def test_address_space() -> None:
    found, words = ask_section("Memory", before=("prlimit", f"--as={8 << 30}")).verdict_and_text(
        "Memory", "address space"
    )
    assert found == "problem" and "ulimit -v unlimited" in words


def test_libraries_that_are_told_otherwise() -> None:
    answer = ask_section("CPU", ONEDNN_MAX_CPU_ISA="AVX2", NUMBA_DISABLE_JIT="1")
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in answer.one("CPU", "variables")["value"]
    assert answer.one("CPU", "compiler")["verdict"] == "problem"


def test_old_and_missing_packages(tmp_path: Path) -> None:
    for name, version in (("torch", "2.4.0"), ("llvmlite", "0.1.0")):
        about = tmp_path / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    answer = ask_section("Versions", PYTHONPATH=str(tmp_path))
    assert answer.one("Versions", "torch")["value"] == "2.4.0; moray needs torch<2.14,>=2.11"
    assert answer.one("Versions", "torch")["fix"] == "pip install 'torch<2.14,>=2.11'"
    assert answer.one("Versions", "llvmlite")["value"].startswith("0.1.0; numba needs llvmlite")
    assert answer.code == 1


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    """A disk in a folder whose path is short enough for Ray's sockets."""
    with TemporaryDirectory(dir="/tmp", prefix="d-") as folder, small_disk(Path(folder, "d"), 4 << 20) as disk:
        yield disk


def test_a_small_disk_of_memory(disk: SmallDisk) -> None:
    assert file_system(disk.path) == "tmpfs" != file_system(Path("/proc")) == "proc"
    assert file_system(nearest_folder(disk.path / "a/b")) == "tmpfs"
    probe(disk.path)
    found, words = ask_section("Disk", RAY_TMPDIR=str(disk.path)).verdict_and_text("Disk", "Ray's folder")
    assert found == "warning" and "(tmpfs)" in words


def test_a_disk_that_cannot_be_written(disk: SmallDisk) -> None:
    disk.remount("ro")
    with pytest.raises(OSError, match="Read-only file system"):
        probe(disk.path)
    answer = ask_section("Disk", RAY_TMPDIR=str(disk.path), XDG_CACHE_HOME=str(disk.path / "cache"))
    assert answer.one("Disk", "Ray's folder")["verdict"] == "warning"
    assert "cannot be written (Read-only file system)" in answer.one("Disk", "Ray's folder")["value"]
    assert answer.one("Disk", "downloads")["verdict"] == "warning"


def test_a_probe_leaves_nothing(tmp_path: Path) -> None:
    probe(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def group() -> Iterator[Path]:
    """A real control group of version 1 with a limit of 1.5 GiB."""
    folder = TINY_GROUP / f"moray-{uuid4().hex}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        (folder / "memory.limit_in_bytes").write_text(str(3 << 29))
        yield folder
    finally:
        folder.rmdir()


def test_a_small_container(group: Path) -> None:
    found, words = ask_section(
        "Memory", before=("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
    ).verdict_and_text("Memory", "memory")
    assert found == "warning" and "of 1.5 GiB (the limit of the control group)" in words


def unshared(mount: str) -> tuple[str, ...]:
    """A command that runs another with a view of the disk in which something is mounted."""
    command = ("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("nothing can be mounted here")
    return command


def test_little_shared_memory() -> None:
    found, words = ask_section("Memory", before=unshared("mount -t tmpfs -o size=64m none /dev/shm")).verdict_and_text(
        "Memory", "shared memory"
    )
    assert found == "warning" and "/dev/shm has 67.1 MB free" in words and "docker run --shm-size=" in words


def test_compiled_functions_that_are_kept_nowhere(tmp_path: Path) -> None:
    of_others = tmp_path / f"moray-numba-{os.getuid()}"
    of_others.mkdir()
    of_others.chmod(0o777)
    nowhere = {"NUMBA_CACHE_DIR": "/proc", "XDG_CACHE_HOME": "/proc", "TMPDIR": str(tmp_path)}
    found, words = ask_section("CPU", **nowhere).verdict_and_text("CPU", "compiler")
    assert found == "warning" and "NUMBA_CACHE_DIR" in words
    chosen = nowhere | {"NUMBA_CACHE_DIR": str(tmp_path / "chosen")}
    found, words = ask_section("CPU", **chosen).verdict_and_text("CPU", "compiler")
    assert found == "ok" and f"cache in {tmp_path / 'chosen'}/moray-" in words


def test_python_and_where_moray_is() -> None:
    answer = ask_section("Versions")
    assert sys.executable in answer.one("Versions", "python")["value"]
    assert os.path.dirname(os.path.realpath(__file__)).split("/tests/")[0] in answer.one("Versions", "moray")["value"]
