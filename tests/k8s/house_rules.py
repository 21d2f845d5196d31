"""What we ask of our own manifests beyond what would be accepted."""

import re
import tomllib
from importlib.metadata import version
from typing import Any

from rendered import K8S, RAY_KINDS, Object, cluster_spec, pod_templates

SUBMITS = ("HTTPMode",)
VERSION = tomllib.loads((K8S.parent / "pyproject.toml").read_text())["project"]["version"]
IMAGE = re.compile(r"([\w.-]+(:\d+)?/)*[\w.-]+:(?P<tag>[\w.-]+)(@sha256:[0-9a-f]{64})?")
GPU = "nvidia.com/gpu"


def problems(objects: tuple[Object, ...]) -> list[str]:
    found = []
    for where, template in pod_templates(objects):
        found += [f"{where}: {problem}" for problem in _pod(template["spec"])]
    for o in objects:
        if o["kind"] in RAY_KINDS:
            found += [f"{o['kind']}: {problem}" for problem in _cluster(cluster_spec(o))]
        if o["kind"] == "RayJob":
            found += _job(o["spec"])
        if o["kind"] == "Secret" or (o["kind"] == "ConfigMap" and re.search("(password|token|secret)[\"']?:", str(o))):
            found.append(f"{o['kind']} {o['metadata']['name']}: no secret belongs in these files")
        if o["kind"] not in ("Namespace", "PriorityClass") and o["metadata"].get("namespace") != "moray":
            found.append(f"{o['kind']} {o['metadata']['name']}: not in the namespace moray")
    return found


def _pod(pod: Object) -> list[str]:
    """Return what the namespace's `restricted` standard refuses, and requests below limits: no pod takes another's."""
    context, volumes, found = pod.get("securityContext", {}), pod.get("volumes", []), []
    if not context.get("runAsNonRoot") or not context.get("runAsUser"):
        found.append("may run as root")
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        found.append("no seccomp profile")
    if any("hostPath" in volume for volume in volumes) or pod.get("hostNetwork") or pod.get("hostPID"):
        found.append("uses the host")
    if any("emptyDir" in volume and "sizeLimit" not in volume["emptyDir"] for volume in volumes):
        found.append("an emptyDir without a limit")
    disk = pod["containers"][0].get("resources", {}).get("limits", {}).get("ephemeral-storage")
    folders = [volume["emptyDir"] for volume in volumes if "emptyDir" in volume]
    on_disk = [_bytes(folder.get("sizeLimit", "0Gi")) for folder in folders if folder.get("medium") != "Memory"]
    if disk and sum(on_disk) > _bytes(disk):
        found.append("emptyDirs of more than ephemeral-storage: full, the pod is evicted")
    for container in pod["containers"] + pod.get("initContainers", []):
        found += [f"{container['name']}: {problem}" for problem in _container(container)]
    return found


def _container(container: Object) -> list[str]:
    context, resources, found = container.get("securityContext", {}), container.get("resources", {}), _safe(container)
    if not context.get("readOnlyRootFilesystem"):
        found.append("the root file system can be written")
    if not resources.get("limits") or resources["limits"] != resources.get("requests"):
        found.append("requests are not limits")
    image = IMAGE.fullmatch(container["image"])
    if image is None or image["tag"] == "latest":
        found.append(f"image {container['image']!r} has no version")
    elif "moray" in container["image"] and image["tag"] not in (f"{VERSION}-cpu", f"{VERSION}-cuda"):
        found.append(f"image {container['image']!r} is not of moray {VERSION}")
    for variable in container.get("env", ()):
        if re.search("PASSWORD|TOKEN|SECRET|KEY", variable["name"]) and "value" in variable:
            found.append(f"{variable['name']} is written out")
    return found


def _safe(holder: dict[str, Any]) -> list[str]:
    context = holder.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False or context.get("capabilities") != {"drop": ["ALL"]}:
        return ["may gain privileges"]
    return []


def _cluster(spec: Object) -> list[str]:
    found = [f"autoscaler: {problem}" for problem in _safe(spec["autoscalerOptions"])]
    if spec.get("rayVersion") != version("ray"):
        found.append(f"rayVersion {spec.get('rayVersion')} is not that of the lock, {version('ray')}")
    if spec.get("authOptions", {}).get("mode") != "token":
        found.append("open to whoever reaches it: authOptions.mode is not token")
    head = spec["headGroupSpec"]
    if head["rayStartParams"].get("num-cpus") != "0" or GPU in str(head["template"]):
        found.append("the head takes work")
    if head["template"]["spec"].get("automountServiceAccountToken") is False:
        found.append("the head has no token for the API server, which the autoscaler needs")
    for group in spec["workerGroupSpecs"]:
        found += [f"{group['groupName']}: {problem}" for problem in _group(group)]
    return found


def _group(group: Object) -> list[str]:
    pod, found = group["template"]["spec"], []
    if pod.get("automountServiceAccountToken") is not False:
        found.append("workers have a token for the API server")
    if not {"minReplicas", "maxReplicas"} <= group.keys() or group["maxReplicas"] > 100:
        found.append("replicas without a bound")
    if group.get("scaleStrategy") != {"workersToDelete": []}:
        found.append("no scaleStrategy for the autoscaler to replace")
    limits = pod["containers"][0]["resources"]["limits"]
    if not limits["cpu"].isdigit():
        found.append(f"cpu {limits['cpu']} is not whole, and Ray counts whole ones")
    if int(group["rayStartParams"].get("object-store-memory", 0)) not in range(1, _bytes(limits["memory"]) // 3):
        found.append("the object store takes a third of the memory or more")
    if int(limits.get(GPU, 0)) > 1 and not _has_room_for_ranks(group):
        found.append("several GPUs, and /dev/shm has no GiB for each beside the object store, or is not memory")
    has_gpu, tolerates = GPU in limits, any(t.get("key") == GPU for t in pod.get("tolerations", ()))
    if has_gpu != tolerates or has_gpu != pod["containers"][0]["image"].endswith("-cuda"):
        found.append("GPU, toleration and image do not go together")
    return found


def _has_room_for_ranks(group: Object) -> bool:
    """Return whether /dev/shm has room for what ranks exchange beside Ray's objects, and fits the pod's memory."""
    pod = group["template"]["spec"]
    container = pod["containers"][0]
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    shm = next((volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == mounted.get("/dev/shm")), {})
    limits = container["resources"]["limits"]
    needed = int(group["rayStartParams"]["object-store-memory"]) + (int(limits[GPU]) << 30)
    return shm.get("medium") == "Memory" and needed <= _bytes(shm["sizeLimit"]) < _bytes(limits["memory"]) // 2


def _job(spec: Object) -> list[str]:
    found = []
    if spec.get("submissionMode") not in SUBMITS:
        found.append("RayJob: only HTTPMode outlives a broken log stream")
    if spec.get("entrypointNumCpus", 0) or spec.get("entrypointNumGpus", 0):
        found.append("RayJob: the driver is to run on the head, which has no CPU to give")
    if not {"backoffLimit", "activeDeadlineSeconds", "preRunningDeadlineSeconds"} <= spec.keys():
        found.append("RayJob: no retry or no deadline")
    if "jobId" in spec:
        found.append("RayJob: a retry cannot have the same jobId")
    return found


def _bytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) << 30
