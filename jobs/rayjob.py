"""A RayJob made of a spec and of what kustomize renders of an overlay: everything that is applied for a job. Pure."""

import copy
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any

from batch.spec import JobSpec
from batch.spec.yaml_text import dump_yaml
from engine.errors import Problem, SpecError, UserError
from jobs.submission import output_digits
from jobs.worker_groups import place_workers

Object = dict[str, Any]
SPEC = "job.yaml"
NAME, OUTPUT = "moray/name", "moray/output"  # annotations of a RayJob
DIGITS = "moray/output-digits"  # a label: no label holds a path
IMAGE = "moray"  # the last part of the name of our images
IN_IMAGE = "/opt/moray"
EXAMPLE_REGISTRY = "registry.example.com/"


def make_rayjob(
    rendered: Sequence[Object], spec: JobSpec, name: str, *, namespace: str | None = None, image: str | None = None
) -> list[Object]:
    """The objects to apply.

    rendered:   of an overlay; they are left as they are
    name:       of the RayJob and of its ConfigMap
    namespace:  in place of the overlay's
    image:      in place of the overlay's. A name keeps each pod's tag (-cpu, -cuda); with a tag it is that of all pods

    Raises UserError where the overlay is none of a job, SpecError where the spec's paths or workers do not fit it.
    """
    objects = copy.deepcopy(list(rendered))
    job = _only(objects, "RayJob")
    config = _only(objects, "ConfigMap", with_data=SPEC)
    cluster = job["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    check_pod_paths(spec, pods)
    config["data"][SPEC] = place_workers(spec, cluster["workerGroupSpecs"]).to_yaml()
    for volume in (volume for pod in pods for volume in pod.get("volumes", ())):
        if volume.get("configMap", {}).get("name") == config["metadata"]["name"]:
            volume["configMap"]["name"] = name
    for o in (job, config):
        about = o["metadata"]
        about["name"] = name
        about["labels"] = {**about.get("labels", {}), DIGITS: output_digits(spec.output.path)}
        said = {NAME: spec.name, OUTPUT: spec.output.path.rstrip("/")}
        about["annotations"] = {**about.get("annotations", {}), **said}
    if namespace is not None:
        _move(objects, namespace)
    if image is not None:
        for container in _containers(pods):
            container["image"] = _image(container["image"], image)
    return objects


def check_pod_paths(spec: JobSpec, pods: Sequence[Object]) -> None:
    """Raises SpecError for paths that not every pod sees, or cannot write where the output goes."""
    mounted = [_mounts(pod) for pod in pods]
    seen = {path for path in mounted[0] if all(path in mounts for mounts in mounted)}
    written = {path for path in seen if all(mounts[path] for mounts in mounted)}
    inputs = (spec.input.path,) if isinstance(spec.input.path, str) else spec.input.path
    wanted = [
        ("model.path", spec.model.path, ("s3", "gs", "hf"), seen | {IN_IMAGE}),
        *(("input.path", path, ("s3", "gs"), seen | {IN_IMAGE}) for path in inputs),
        ("output.path", spec.output.path, ("s3", "gs"), written),
    ]
    problems = []
    for key, path, schemes, folders in wanted:
        scheme, there, _ = path.rpartition("://")
        if scheme in schemes if there else any(_lies_in(path, folder) for folder in folders):
            continue
        addresses = ", ".join(f"{one}://" for one in schemes)
        volumes = f", or a path in {', '.join(sorted(folders))}" if folders else ""
        problems.append(Problem(key, f"{path!r} is not what every pod can reach; give {addresses}{volumes}"))
    if problems:
        raise SpecError(problems)


def check_images(objects: Sequence[Object]) -> None:
    """Raises UserError for the registry that stands in our overlays, which nobody has."""
    cluster = _only(objects, "RayJob")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for container in _containers([group["template"]["spec"]]):
            if container["image"].startswith(EXAMPLE_REGISTRY):
                raise UserError(
                    f"the overlay's image is {container['image']}, an example; give yours: --image "
                    "REGISTRY/moray, or write it into the overlay's images"
                )


def to_yaml(objects: Sequence[Object]) -> str:
    return "---\n".join(map(dump_yaml, objects))


def _only(objects: Sequence[Object], kind: str, with_data: str | None = None) -> Object:
    found = [o for o in objects if o["kind"] == kind and (with_data is None or with_data in o.get("data", {}))]
    if len(found) != 1:
        wanted = kind if with_data is None else f"{kind} with {with_data}"
        raise UserError(
            f"the overlay of a job renders exactly one {wanted}, this one {len(found)}; see k8s/overlays/cpu/batch"
        )
    return found[0]


def _move(objects: Sequence[Object], namespace: str) -> None:
    for o in objects:
        if o["kind"] == "Namespace":
            o["metadata"]["name"] = namespace
        elif "namespace" in o["metadata"]:
            o["metadata"]["namespace"] = namespace


def _containers(pods: Sequence[Object]) -> Iterator[Object]:
    """Those that run our image."""
    for pod in pods:
        for container in [*pod["containers"], *pod.get("initContainers", ())]:
            if re.search(rf"(^|/){IMAGE}[:@]", container["image"]):
                yield container


def _image(there: str, wanted: str) -> str:
    has_tag = re.search("[:@]", wanted.rpartition("/")[2])
    return wanted if has_tag else wanted + there.rpartition("/")[2].removeprefix(IMAGE)


def _mounts(pod: Object) -> dict[str, bool]:
    """Path -> whether it can be written, of the volumes that outlive a pod."""
    claims = {v["name"]: v["persistentVolumeClaim"] for v in pod.get("volumes", ()) if "persistentVolumeClaim" in v}
    return {
        mount["mountPath"]: not (mount.get("readOnly") or claims[mount["name"]].get("readOnly"))
        for mount in pod["containers"][0].get("volumeMounts", ())
        if mount["name"] in claims
    }


def _lies_in(path: str, folder: str) -> bool:
    return f"{posixpath.normpath(path)}/".startswith(f"{folder.rstrip('/')}/")
