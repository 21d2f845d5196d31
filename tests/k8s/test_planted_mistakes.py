"""The checks of test_manifests.py each find the mistakes that they are there for."""

import copy
from typing import Any

import pytest
from rendered import K8S, Object, render
from test_manifests import CHECKS, KUBERAY

GONE = object()
CLUSTER = {"RayJob": "spec.rayClusterSpec", "RayService": "spec.rayClusterConfig", "RayCluster": "spec"}
FOLDER = {"RayJob": "overlays/aks/batch", "RayService": "overlays/aks/service", "RayCluster": "overlays/aks/pool"}

HEAD = "@.headGroupSpec.template.spec"
GPU = "@.workerGroupSpecs.0"
WORKER = f"{GPU}.template.spec.containers.0"
RULES = [{"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 0}}]
LEGACY = {"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteSelf"}}

# kind, what is set (@: the cluster's spec), to what, the check, what it says
MISTAKES: list[tuple[str, str, Any, str, str]] = [
    ("RayJob", "spec.backofLimit", 2, "schema", "backofLimit"),
    ("RayJob", "spec.backoffLimit", "2", "schema", "is not of type 'integer'"),
    ("RayJob", "spec.preRunningDeadlineSeconds", 0, "schema", "minimum of 1"),
    ("RayJob", "spec.managedBy", "us", "schema", "managedBy"),
    ("RayJob", "spec.deletionStrategy", {"deletionRules": RULES} | LEGACY, "schema", "deletion"),
    ("RayJob", "@.authOptions.mode", "on", "schema", "'on' is not one of"),
    ("RayCluster", f"{GPU}.minReplica", 1, "schema", "minReplica"),
    ("RayCluster", f"{GPU}.template", GONE, "schema", "'template' is a required property"),
    ("RayCluster", "@.rayVersion", 2.60, "schema", "is not of type 'string'"),
    ("RayService", "spec.serveConfig", "", "schema", "serveConfig"),
    ("RayCluster", f"{WORKER}.volumeMount", [], "core", "volumeMount"),
    ("RayCluster", f"{WORKER}.ports.0.containerPort", "8000", "core", "is not of type 'integer'"),
    ("NetworkPolicy", "spec.podSelektor", {}, "core", "podSelektor"),
    ("PodDisruptionBudget", "spec.maxUnavailable", [0], "core", "maxUnavailable"),
    ("RayJob", "metadata.name", "m" * 48, "operator", "more than 47"),
    ("RayJob", "metadata.name", "4x2", "operator", "no DNS label"),
    ("RayJob", "spec.shutdownAfterJobFinishes", False, "operator", "ttlSecondsAfterFinished without"),
    ("RayJob", "spec.submissionMode", "InteractiveMode", "operator", "backoffLimit with InteractiveMode"),
    ("RayJob", "spec.clusterSelector", {"ray.io/cluster": "moray"}, "operator", "clusterSelector with"),
    ("RayJob", "spec.activeDeadlineSeconds", 0, "operator", "not positive"),
    ("RayJob", "spec.deletionStrategy", {"deletionRules": RULES}, "operator", "deletionRules with shutdown"),
    ("RayService", "@.headGroupSpec.headService", {"metadata": {"name": "head"}}, "operator", "has a name"),
    ("RayService", "spec.upgradeStrategy.type", "Rolling", "operator", "'Rolling' is unknown"),
    (
        "RayService",
        "spec.upgradeStrategy.type",
        "NewClusterWithIncrementalUpgrade",
        "operator",
        "clusterUpgradeOptions",
    ),
    ("RayService", "metadata.annotations", {"ray.io/initializing-timeout": "soon"}, "operator", "no duration"),
    ("RayCluster", "@.rayVersion", "2.51.0", "operator", "needs rayVersion 2.52.0"),
    ("RayCluster", "@.autoscalerOptions.version", GONE, "operator", "need autoscaler v2"),
    ("RayCluster", f"{GPU}.template.spec.restartPolicy", "Always", "operator", "restartPolicy"),
    ("RayCluster", f"{GPU}.minReplicas", 9, "operator", "minReplicas is above"),
    ("RayCluster", f"{GPU}.rayStartParams.labels", "spot=true", "operator", "labels in rayStartParams"),
    ("RayCluster", f"{GPU}.suspend", True, "operator", "suspend with the autoscaler"),
    ("RayCluster", "@.headGroupSpec.resources", {"CPU": "4"}, "operator", "resources in rayStartParams and"),
    ("RayCluster", f"{HEAD}.containers.0.env.0.name", "RAY_REDIS_ADDRESS", "operator", "RAY_REDIS_ADDRESS"),
    ("RayCluster", f"{HEAD}.containers.0.env.0.name", "RAY_enable_autoscaler_v2", "operator", "beside"),
    ("RayCluster", "@.workerGroupSpecs.2.template.spec.containers", [], "operator", "has no container"),
    ("RayJob", f"{HEAD}.serviceAccountName", "moray-heads", "references", "no ServiceAccount 'moray-heads'"),
    ("RayJob", f"{HEAD}.priorityClassName", "high", "references", "no PriorityClass"),
    ("RayJob", f"{HEAD}.volumes.4.configMap.name", "job-4k2", "references", "no ConfigMap 'job-4k2'"),
    ("RayJob", f"{GPU}.template.spec.volumes.2.persistentVolumeClaim.claimName", "x", "references", "VolumeClaim 'x'"),
    ("RayJob", f"{WORKER}.envFrom.0.secretRef.optional", False, "references", "no Secret 'moray-store'"),
    ("RayJob", f"{WORKER}.volumeMounts.0.name", "temp", "references", "no volume 'temp'"),
    ("RayCluster", "@.gcsFaultToleranceOptions.redisAddress", "cache:6379", "references", "no Service 'cache'"),
    ("RayCluster", "@.rayVersion", "2.59.0", "house", "is not that of the lock"),
    ("RayCluster", "@.authOptions", GONE, "house", "open to whoever"),
    ("RayCluster", "@.headGroupSpec.rayStartParams.num-cpus", "4", "house", "the head takes work"),
    ("RayCluster", f"{GPU}.scaleStrategy", GONE, "house", "no scaleStrategy"),
    ("RayCluster", f"{GPU}.maxReplicas", 2**31 - 1, "house", "without a bound"),
    ("RayCluster", f"{GPU}.rayStartParams.object-store-memory", "99999999999", "house", "third of the memory"),
    ("RayCluster", f"{GPU}.template.spec.tolerations", [], "house", "do not go together"),
    ("RayCluster", f"{GPU}.template.spec.automountServiceAccountToken", True, "house", "workers have a token"),
    ("RayCluster", f"{WORKER}.image", "registry.example.com/moray", "house", "has no version"),
    ("RayCluster", f"{WORKER}.image", "registry.example.com/moray:0.0.1-cuda", "house", "not of moray"),
    ("RayCluster", f"{WORKER}.resources.requests.memory", "1Gi", "house", "requests are not limits"),
    (
        "RayCluster",
        f"{WORKER}.resources",
        {k: {"cpu": "500m", "memory": "1Gi"} for k in ("limits", "requests")},
        "house",
        "not whole",
    ),
    ("RayCluster", f"{WORKER}.securityContext.allowPrivilegeEscalation", GONE, "house", "may gain privileges"),
    ("RayCluster", f"{WORKER}.securityContext.capabilities.add", ["SYS_PTRACE"], "house", "may gain privileges"),
    ("RayCluster", f"{WORKER}.securityContext.readOnlyRootFilesystem", False, "house", "can be written"),
    ("RayCluster", f"{WORKER}.env.0", {"name": "HF_TOKEN", "value": "x"}, "house", "HF_TOKEN is written out"),
    ("RayCluster", f"{GPU}.template.spec.securityContext.runAsNonRoot", GONE, "house", "may run as root"),
    ("RayCluster", f"{GPU}.template.spec.hostNetwork", True, "house", "uses the host"),
    ("RayCluster", f"{GPU}.template.spec.volumes.0.emptyDir", {}, "house", "without a limit"),
    ("RayCluster", f"{GPU}.template.spec.volumes.0.emptyDir.sizeLimit", "99Gi", "house", "more than ephemeral-storage"),
    (
        "RayCluster",
        f"{WORKER}.resources.limits",
        {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "2"},
        "house",
        "/dev/shm",
    ),
    ("RayCluster", "@.autoscalerOptions.securityContext", GONE, "house", "autoscaler: may gain"),
    ("RayJob", "spec.submissionMode", GONE, "house", "only HTTPMode"),
    ("RayJob", "spec.entrypointNumCpus", 1, "house", "the driver is to run on the head"),
    ("RayJob", "spec.backoffLimit", GONE, "house", "no retry"),
    ("RayJob", "spec.jobId", "moray", "house", "same jobId"),
    ("ConfigMap", "data", {"job.yaml": "token: abc"}, "house", "no secret belongs"),
    ("NetworkPolicy", "metadata.namespace", "default", "house", "not in the namespace"),
]


def _name(value: object) -> str:
    """Return a name that is the same in every process that collects the tests."""
    return "gone" if value is GONE else str(value)[:40]


@pytest.mark.parametrize(("kind", "path", "value", "check", "message"), MISTAKES, ids=_name)
def test_mistake_is_found(kind: str, path: str, value: Any, check: str, message: str) -> None:
    objects = copy.deepcopy(render(K8S / FOLDER.get(kind, "overlays/aks/batch")))
    assert CHECKS[check](objects) == []
    change(next(o for o in objects if o["kind"] == kind), path.replace("@", CLUSTER.get(kind, "")), value)
    found = CHECKS[check](objects)
    assert any(message in problem for problem in found), found


def test_lost_patch_is_found() -> None:
    """A strategic merge patch on a Ray object replaces the list of groups, and with it their pods."""
    objects = copy.deepcopy(render(K8S / "overlays/aks/pool"))
    cluster = next(o for o in objects if o["kind"] == "RayCluster")
    cluster["spec"]["workerGroupSpecs"] = [{"groupName": "gpu", "maxReplicas": 2}]
    assert any("'template' is a required property" in problem for problem in CHECKS["schema"](objects))


@pytest.mark.skipif(not KUBERAY, reason="KUBERAY_CRD_DIR names no folder with KubeRay's own definitions")
def test_kuberay_knows_more_rules() -> None:
    objects = copy.deepcopy(render(K8S / "overlays/aks/batch"))
    both = {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}
    rules = {"deletionRules": [{"policy": "DeleteSelf", "condition": both}]}
    change(next(o for o in objects if o["kind"] == "RayJob"), "spec.deletionStrategy", rules)
    assert any("cannot be used together" in problem for problem in CHECKS["schema"](objects))


def change(o: Object, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    holder: Any = o
    for key in parents:
        holder = holder[int(key) if isinstance(holder, list) else key]
    if value is GONE:
        del holder[last]
    else:
        holder[int(last) if isinstance(holder, list) else last] = value
