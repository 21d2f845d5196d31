"""Tests of the limits of control groups: of both versions from their files, and of a real group."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from moray.engine.platform.control_group import MemoryShare, cpu_quota, memory_share, process_limit

MEMORY_1 = Path("/sys/fs/cgroup/memory")


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def own(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "own"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_container_of_version_2_is_the_root(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    stat = "anon 300\nfile 700\ninactive_file 500\n"
    write(root, memory__max="2000", memory__current="1000", memory__stat=stat, cpu__max="150000 100000", pids__max="99")
    mine = own(tmp_path, "0::/")
    assert memory_share(root, mine) == MemoryShare(2000, 500)
    assert memory_share(root, mine).available_bytes == 1500  # type: ignore[union-attr]
    assert (cpu_quota(root, mine), process_limit(root, mine)) == (1.5, 99)


def test_a_limit_of_a_group_above_holds(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    write(root / "a", memory__max="5000", memory__current="4900", memory__stat="", cpu__max="max 100000")
    write(root / "a/b", memory__max="3000", memory__current="100", memory__stat="", cpu__max="50000 100000")
    write(root / "a/b/c", memory__max="max", memory__current="100", memory__stat="", pids__max="max")
    mine = own(tmp_path, "0::/a/b/c")
    assert memory_share(root, mine) == MemoryShare(5000, 4900)
    assert (cpu_quota(root, mine), process_limit(root, mine)) == (0.5, None)


def test_version_1_beside_version_2(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    write(root / "unified")
    limit, usage = "memory__limit_in_bytes", "memory__usage_in_bytes"
    write(root / "memory", **{limit: str(2**63 - 4096), usage: "9", "memory__stat": "total_inactive_file 1\n"})
    write(root / "memory/job", **{limit: "4096", usage: "3000", "memory__stat": "total_inactive_file 1000\n"})
    write(root / "cpu,cpuacct/job", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    write(root / "pids/job", pids__max="64")
    mine = own(tmp_path, "4:memory:/job", "2:cpu,cpuacct:/job", "8:pids:/job", "0::/")
    assert memory_share(root, mine) == MemoryShare(4096, 2000)
    assert (cpu_quota(root, mine), process_limit(root, mine)) == (2.0, 64)


def test_a_container_of_version_1_does_not_see_its_own_path(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    write(root / "memory", memory__limit_in_bytes="4096", memory__usage_in_bytes="96", memory__stat="")
    mine = own(tmp_path, "4:memory:/docker/0123")
    assert memory_share(root, mine) == MemoryShare(4096, 96)


def test_no_control_groups(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert memory_share(nowhere, nowhere) is cpu_quota(nowhere, nowhere) is process_limit(nowhere, nowhere) is None


@pytest.fixture
def group() -> Iterator[Path]:
    """Create a real group of version 1 with a limit of 1 GiB."""
    folder = MEMORY_1 / f"moray-{uuid4().hex}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        (folder / "memory.limit_in_bytes").write_text(str(1 << 30))
        yield folder
    finally:
        folder.rmdir()


def test_a_real_group(group: Path) -> None:
    code = "from moray.engine.platform import memory; print(memory.total_bytes(), memory.available_bytes())"
    command = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{code}'"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, env=os.environ)
    total, available = map(int, done.stdout.split())
    assert total == 1 << 30
    assert 0 < available < total
