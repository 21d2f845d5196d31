"""k8s/image: the Dockerfile and what it installs, as far as that goes without an engine to build with."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from patience import PATIENCE_S
from rendered import K8S

IMAGE = K8S / "image"
PROJECT = tomllib.loads((K8S.parent / "pyproject.toml").read_text())
DOCKERFILE = (IMAGE / "Dockerfile").read_text()


def stages() -> dict[str, list[str]]:
    """Name -> instructions, one a line."""
    found: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n\s*", "", DOCKERFILE).splitlines():
        if start := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[start[2]] = [line]
        elif found and line and not line.startswith("#"):
            found[list(found)[-1]].append(line)
    return found


def locked(target: str) -> dict[str, str]:
    """Distribution -> version. Fails where one has no hash."""
    found = {}
    for entry in re.split(r"\n(?=\S)", (IMAGE / f"{target}.lock").read_text()):
        if not entry.startswith("#"):
            requirement = Requirement(entry.partition("\\")[0].strip())
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), requirement.name
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            found[requirement.name] = specifier.version
    return found


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}")
    assert hadolint is not None
    done = subprocess.run([hadolint, IMAGE / "Dockerfile"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (0, "")


def test_targets_run_as_nobody_in_particular() -> None:
    for target in ("cpu", "cuda"):
        assert [line for line in stages()[target] if line.startswith("USER")][-1] == "USER 1000:1000"
        assert not [line for line in stages()[target] if line.startswith(("ENTRYPOINT", "HEALTHCHECK"))]


def test_base_is_pinned_and_has_what_kuberay_calls() -> None:
    assert re.search(r"^ARG PYTHON=3\.11\.\d+-slim-bookworm$", DOCKERFILE, re.M)
    assert {line.split()[1] for name, (line, *_) in stages().items() if name in ("build", "base")} == {
        "python:${PYTHON}"
    }
    (packages,) = (line for line in stages()["base"] if "apt-get install" in line)
    assert {"bash", "wget"} <= set(packages.split())
    assert f"ARG VERSION={PROJECT['project']['version']}" in stages()["base"]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_everything_installed_has_a_hash(target: str) -> None:
    installs = [line for line in stages()[f"build-{target}"] if "pip install" in line]
    assert len(installs) == 2
    assert "--require-hashes" in installs[0] and "--no-deps" in installs[0] and f"{target}.lock" in installs[0]
    assert "--no-deps" in installs[1] and "--no-build-isolation" in installs[1] and "compileall" in installs[1]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_lock_is_that_of_the_project(target: str) -> None:
    versions = locked(target)
    for text in [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]:
        wanted = Requirement(text)
        if (target, wanted.name) == ("cpu", "triton"):
            continue
        assert wanted.specifier.contains(versions[wanted.name.replace("_", "-")]), f"{text}: run `make lock`"


def test_images_differ_by_cuda_alone() -> None:
    cpu, cuda = locked("cpu"), locked("cuda")
    assert not [name for name in cpu if name.startswith(("nvidia", "cuda"))]
    assert (cpu["torch"], "nvidia-cublas" in cuda) == (f"{cuda['torch']}+cpu", True)
    assert {name for name in cpu if cuda.get(name) != cpu[name]} == {"torch"}
    assert "triton" in cuda.keys() - cpu.keys()


def test_kernels_are_compiled_ahead_with_the_triton_of_the_image() -> None:
    (checked,) = re.findall(r"^AOT_TRITON := (.*)$", (K8S.parent / "Makefile").read_text(), re.M)
    assert locked("cuda")["triton"] in checked.split()


def test_ray_is_that_of_the_clusters() -> None:
    """Head and workers of two versions do not speak with each other."""
    cluster = yaml.safe_load((K8S / "base" / "cluster.yaml").read_text())
    assert {locked("cpu")["ray"], locked("cuda")["ray"]} == {cluster["spec"]["rayVersion"]}


def test_context_holds_all_packages() -> None:
    listed = set((IMAGE / "Dockerfile.dockerignore").read_text().split())
    folders = {path.name for path in (K8S.parent / "src/moray").iterdir() if path.is_symlink()}
    assert "batch" in folders and {f"!{name}" for name in (*folders, "src", "examples", "pyproject.toml")} <= listed
    assert "*" in listed
