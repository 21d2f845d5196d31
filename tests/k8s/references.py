"""Names of other objects that do not lead to one: kustomize does not know those inside Ray's objects."""

from collections.abc import Iterator
from typing import Any

from rendered import RAY_KINDS, Object, cluster_spec, pod_templates

# What a person makes, with kubectl: no secret is in these files.
MADE_BY_HAND = {
    ("Secret", "moray-keys"),
    ("Secret", "moray-redis"),
}


def problems(objects: tuple[Object, ...]) -> list[str]:
    there = {(o["kind"], o["metadata"]["name"]) for o in objects} | MADE_BY_HAND | {("ServiceAccount", "default")}
    wanted = [(where, reference) for where, template in pod_templates(objects) for reference in _of_pod(template)]
    for o in objects:
        if o["kind"] in RAY_KINDS:
            ft = cluster_spec(o).get("gcsFaultToleranceOptions", {})
            wanted += [(o["kind"], ("Secret", name)) for name in _secret_keys(ft)]
            if ft:
                wanted.append((o["kind"], ("Service", ft["redisAddress"].partition(":")[0])))
    return [f"{where}: no {kind} {name!r}" for where, (kind, name) in wanted if (kind, name) not in there] + [
        problem for where, template in pod_templates(objects) for problem in _mounts(where, template)
    ]


def _of_pod(template: Object) -> Iterator[tuple[str, str]]:
    pod = template["spec"]
    yield "ServiceAccount", pod.get("serviceAccountName", "default")
    if "priorityClassName" in pod:
        yield "PriorityClass", pod["priorityClassName"]
    for volume in pod.get("volumes", ()):
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
        if "configMap" in volume and not volume["configMap"].get("optional"):
            yield "ConfigMap", volume["configMap"]["name"]
        if "secret" in volume and not volume["secret"].get("optional"):
            yield "Secret", volume["secret"]["secretName"]
    for container in pod["containers"] + pod.get("initContainers", []):
        for source in container.get("envFrom", ()):
            for kind, field in (("Secret", "secretRef"), ("ConfigMap", "configMapRef")):
                if field in source and not source[field].get("optional"):
                    yield kind, source[field]["name"]
        yield from (("Secret", name) for name in _secret_keys(container.get("env", [])))


def _secret_keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "secretKeyRef" in value:
            yield value["secretKeyRef"]["name"]
        for inner in value.values():
            yield from _secret_keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _secret_keys(inner)


def _mounts(where: str, template: Object) -> Iterator[str]:
    pod = template["spec"]
    claims = {"data"} if "StatefulSet redis" in where else set()  # from volumeClaimTemplates
    volumes = {volume["name"] for volume in pod.get("volumes", ())} | claims
    for container in pod["containers"]:
        for mount in container.get("volumeMounts", ()):
            if mount["name"] not in volumes:
                yield f"{where}: no volume {mount['name']!r}"
