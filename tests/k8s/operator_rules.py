"""What KubeRay's operator refuses after the API server has accepted it: such an object stays there and nothing runs.

After ray-operator/controllers/ray/utils/validation.go of KubeRay 1.7, for the fields that k8s/ uses or might use.
"""

import re

from rendered import RAY_KINDS, Object, cluster_spec

NAME_CHARS = {"RayJob": 47, "RayService": 47, "RayCluster": 53}
LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?")
DURATION = re.compile(r"(\d+(\.\d+)?(h|m|s|ms))+|\d+")
REDIS_ENV = ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "REDIS_USERNAME")


def problems(objects: tuple[Object, ...]) -> list[str]:
    found = []
    for o in objects:
        if o["kind"] in RAY_KINDS:
            of_kind = {"RayJob": _job, "RayService": _service}.get(o["kind"], lambda _: [])
            found += [f"{o['kind']}: {problem}" for problem in _name(o) + of_kind(o) + _cluster(cluster_spec(o))]
    return found


def _name(o: Object) -> list[str]:
    name, limit = o["metadata"]["name"], NAME_CHARS[o["kind"]]
    found = [] if len(name) <= limit else [f"name {name!r} has more than {limit} characters"]
    return found if re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) else [*found, f"name {name!r} is no DNS label"]


def _job(o: Object) -> list[str]:
    spec, found = o["spec"], []
    mode, ends = spec.get("submissionMode", "K8sJobMode"), spec.get("shutdownAfterJobFinishes", False)
    if not ends and spec.get("ttlSecondsAfterFinished", 0) > 0:
        found.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    if not ends and spec.get("suspend"):
        found.append("suspend without shutdownAfterJobFinishes")
    for field in ("ttlSecondsAfterFinished", "backoffLimit"):
        if spec.get(field, 0) < 0:
            found.append(f"{field} is negative")
    if spec.get("activeDeadlineSeconds", 1) <= 0:
        found.append("activeDeadlineSeconds is not positive")
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        found.append("backoffLimit with InteractiveMode")
    if mode == "SidecarMode" and {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & spec.keys():
        found.append("SidecarMode with a submitter or a clusterSelector")
    if spec.get("clusterSelector") and (spec.get("suspend") or spec.get("backoffLimit", 0) > 0):
        found.append("clusterSelector with suspend or backoffLimit")
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    if rules and ends:
        found.append("deletionRules with shutdownAfterJobFinishes")
    if any(rule["policy"] == "DeleteWorkers" for rule in rules) and spec["rayClusterSpec"].get(
        "enableInTreeAutoscaling"
    ):
        found.append("DeleteWorkers with the autoscaler")
    return found


def _service(o: Object) -> list[str]:
    spec, found = o["spec"], []
    if o["spec"]["rayClusterConfig"]["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        found.append("headService has a name")
    upgrade = spec.get("upgradeStrategy", {})
    options = upgrade.get("clusterUpgradeOptions")
    if upgrade.get("type", "NewCluster") not in ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"):
        found.append(f"upgradeStrategy {upgrade['type']!r} is unknown")
    if upgrade.get("type") == "NewClusterWithIncrementalUpgrade":
        if not options or options["stepSizePercent"] > options.get("maxSurgePercent", 100):
            found.append("clusterUpgradeOptions are missing, or stepSizePercent is above maxSurgePercent")
        if not spec["rayClusterConfig"].get("enableInTreeAutoscaling"):
            found.append("an incremental upgrade without the autoscaler")
    timeout = o["metadata"].get("annotations", {}).get("ray.io/initializing-timeout", "1m")
    if not DURATION.fullmatch(timeout) or not float(re.sub(r"[a-z]+", "", timeout)):
        found.append(f"initializing-timeout {timeout!r} is no duration")
    return found


def _cluster(spec: Object) -> list[str]:
    version = tuple(int(part) for part in spec.get("rayVersion", "0.0.0").split("."))
    options, is_scaled = spec.get("autoscalerOptions", {}), spec.get("enableInTreeAutoscaling", False)
    is_v2 = is_scaled and options.get("version") == "v2"
    head, found = spec["headGroupSpec"], []
    for name, group in [("head", head), *((g["groupName"], g) for g in spec["workerGroupSpecs"])]:
        found += [f"{name}: {problem}" for problem in _group(group, version=version, is_v2=is_v2, is_scaled=is_scaled)]
    env = {variable["name"] for variable in head["template"]["spec"]["containers"][0].get("env", ())}
    if "RAY_enable_autoscaler_v2" in env and (options.get("version") or not is_scaled):
        found.append("RAY_enable_autoscaler_v2 beside autoscalerOptions.version, or without the autoscaler")
    if spec.get("authOptions", {}).get("mode") == "token" and version < (2, 52, 0):
        found.append("token authentication needs rayVersion 2.52.0 or later")
    if secrets := env & set(REDIS_ENV):
        found.append(f"{', '.join(sorted(secrets))} in the head's environment, not in gcsFaultToleranceOptions")
    if {"redis-password", "redis-username"} & head.get("rayStartParams", {}).keys():
        found.append("Redis credentials in rayStartParams, not in gcsFaultToleranceOptions")
    return found


def _group(group: Object, *, version: tuple[int, ...], is_v2: bool, is_scaled: bool) -> list[str]:
    pod, params, found = group["template"]["spec"], group.get("rayStartParams", {}), []
    if not pod.get("containers"):
        return ["has no container"]
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & params.keys():
        found.append("resources in rayStartParams and beside them")
    if "labels" in params:
        found.append("labels in rayStartParams, not beside them")
    found += [f"label value {v!r}" for v in group.get("labels", {}).values() if len(v) > 63 or not LABEL.fullmatch(v)]
    if is_v2 and pod.get("restartPolicy", "Never") != "Never":
        found.append("restartPolicy must be Never with autoscaler v2")
    if not is_v2 and {"priority", "idleTimeoutSeconds"} & group.keys():
        found.append("priority and idleTimeoutSeconds need autoscaler v2")
    if "priority" in group and version < (2, 56, 0):
        found.append("priority needs rayVersion 2.56.0 or later")
    if group.get("suspend") and is_scaled:
        found.append("suspend with the autoscaler")
    if group.get("minReplicas", 0) > group.get("maxReplicas", 2**31 - 1):
        found.append("minReplicas is above maxReplicas")
    return found
