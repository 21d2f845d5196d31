"""docs/kubernetes.md: its commands are run, or say what they need."""

import re
import shlex
import subprocess

import pytest
from rendered import K8S, kustomize

ROOT = K8S.parent
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "kubernetes.md").read_text(), re.S)
NEEDS = ("# needs a cluster", "# needs docker")
HERE = [line for block in BLOCKS if not block.startswith(NEEDS) for line in block.splitlines()]
THERE = [line for block in BLOCKS if block.startswith(NEEDS) for line in block.splitlines()[1:]]


@pytest.mark.skipif(kustomize() != ["kubectl", "kustomize"], reason="no kubectl on this machine")
@pytest.mark.parametrize("command", HERE)
def test_command_runs(command: str) -> None:
    subprocess.run(shlex.split(command), cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_others_name_what_is_there() -> None:
    assert len(THERE) > 10
    for command in THERE:
        for word in shlex.split(command, comments=True):
            if word.startswith("k8s/"):
                assert (ROOT / word).exists(), command
            if word.startswith("job/"):
                assert f"name: {word.removeprefix('job/')}" in (K8S / "prefetch" / "job.yaml").read_text()


def test_secrets_of_the_guide_are_those_of_the_manifests() -> None:
    guide = set(re.findall(r"^\| `(moray-\w+)` \|", (ROOT / "docs" / "kubernetes.md").read_text(), re.M))
    files = "\n".join(path.read_text() for path in K8S.rglob("*.yaml"))
    wanted = set(re.findall(r"secretName: ([\w-]+)", files)) | set(re.findall(r"secretRef: \{name: ([\w-]+)", files))
    wanted |= set(re.findall(r"secretKeyRef: \{name: ([\w-]+)", files)) | set(
        re.findall(r"credentials: \{name: ([\w-]+)", files)
    )
    assert guide == wanted
