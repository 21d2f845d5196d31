"""docs/kubernetes.md names the Secrets that the manifests want; its commands are tested with all guides'."""

import re

from rendered import K8S


def test_secrets_of_the_guide_are_those_of_the_manifests() -> None:
    guide = set(re.findall(r"^\| `(moray-\w+)` \|", (K8S.parent / "docs" / "kubernetes.md").read_text(), re.M))
    files = "\n".join(path.read_text() for path in K8S.rglob("*.yaml"))
    wanted = set(re.findall(r"secretName: ([\w-]+)", files)) | set(re.findall(r"secretRef: \{name: ([\w-]+)", files))
    wanted |= set(re.findall(r"secretKeyRef: \{name: ([\w-]+)", files)) | set(
        re.findall(r"credentials: \{name: ([\w-]+)", files)
    )
    assert guide == wanted
