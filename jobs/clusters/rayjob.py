"""Make the Kubernetes objects of a job from a spec and the rendered objects of an overlay. Pure."""

import copy
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any

from moray.batch.spec import JobSpec
from moray.engine.errors import Problem, SpecError, UserError
from moray.engine.settings.yaml_text import dump_yaml
from moray.jobs.clusters.submission import output_digits
from moray.jobs.clusters.worker_groups import place_workers

Object = dict[str, Any]
SPEC = "job.yaml"
NAME_ANNOTATION, OUTPUT_ANNOTATION = "moray/name", "moray/output"
DIGITS_LABEL = "moray/output-digits"  # a label with a digest of the output folder: a label cannot hold a path
IMAGE = "moray"  # the last part of the names of our images
IN_IMAGE = "/opt/moray"  # folder of moray, with its small model, in our images
EXAMPLE_REGISTRY = "registry.example.com/"  # in the images of our overlays; users have to replace it


def make_rayjob(
    rendered: Sequence[Object], spec: JobSpec, name: str, *, namespace: str | None = None, image: str | None = None
) -> list[Object]:
    """Return the objects to apply for a job.

    rendered:   the rendered objects of an overlay; they are not changed
    name:       name of the RayJob and of its ConfigMap
    namespace:  replaces the overlay's
    image:      replaces the overlay's. Without a tag each pod keeps its own (-cpu, -cuda); with a tag all pods get it

    Raises UserError where the overlay is not one of a job, SpecError where the spec's paths or workers do not fit it.
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
        metadata = o["metadata"]
        metadata["name"] = name
        metadata["labels"] = {**metadata.get("labels", {}), DIGITS_LABEL: output_digits(spec.output.path)}
        annotations = {NAME_ANNOTATION: spec.name, OUTPUT_ANNOTATION: spec.output.path.rstrip("/")}
        metadata["annotations"] = {**metadata.get("annotations", {}), **annotations}
    if namespace is not None:
        _move(objects, namespace)
    if image is not None:
        for container in _containers(pods):
            container["image"] = _image(container["image"], image)
    return objects


def check_pod_paths(spec: JobSpec, pods: Sequence[Object]) -> None:
    """Raise SpecError for paths that some pod cannot see, or for an output path that some pod cannot write."""
    mounted = [_mounts(pod) for pod in pods]
    readable = {path for path in mounted[0] if all(path in mounts for mounts in mounted)}
    writable = {path for path in readable if all(mounts[path] for mounts in mounted)}
    inputs = (spec.input.path,) if isinstance(spec.input.path, str) else spec.input.path
    named = [
        ("model.path", spec.model.path, ("s3", "gs", "hf"), readable | {IN_IMAGE}),
        *(("input.path", path, ("s3", "gs"), readable | {IN_IMAGE}) for path in inputs),
        ("output.path", spec.output.path, ("s3", "gs"), writable),
    ]
    problems = []
    for key, path, schemes, folders in named:
        scheme, is_address, _ = path.rpartition("://")
        if scheme in schemes if is_address else any(_is_inside(path, folder) for folder in folders):
            continue
        addresses = ", ".join(f"{one}://" for one in schemes)
        volumes = f", or a path in {', '.join(sorted(folders))}" if folders else ""
        problems.append(Problem(key, f"not every pod can reach {path!r}; give {addresses}{volumes}"))
    if problems:
        raise SpecError(problems)


def check_images(objects: Sequence[Object]) -> None:
    """Raise UserError where an image has the example registry of our overlays."""
    cluster = _only(objects, "RayJob")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for container in _containers([group["template"]["spec"]]):
            if container["image"].startswith(EXAMPLE_REGISTRY):
                raise UserError(
                    f"the overlay's image is {container['image']}, an example; give yours: --image "
                    "REGISTRY/moray, or write it into the overlay's images"
                )


def to_yaml(objects: Sequence[Object]) -> str:
    """Return the objects as one YAML text for kubectl."""
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
    """Yield the containers that run our image."""
    for pod in pods:
        for container in [*pod["containers"], *pod.get("initContainers", ())]:
            if re.search(rf"(^|/){IMAGE}[:@]", container["image"]):
                yield container


def _image(current: str, replacement: str) -> str:
    has_tag = re.search("[:@]", replacement.rpartition("/")[2])
    return replacement if has_tag else replacement + current.rpartition("/")[2].removeprefix(IMAGE)


def _mounts(pod: Object) -> dict[str, bool]:
    """Return path -> whether it can be written, for the volumes that outlive a pod."""
    claims = {v["name"]: v["persistentVolumeClaim"] for v in pod.get("volumes", ()) if "persistentVolumeClaim" in v}
    return {
        mount["mountPath"]: not (mount.get("readOnly") or claims[mount["name"]].get("readOnly"))
        for mount in pod["containers"][0].get("volumeMounts", ())
        if mount["name"] in claims
    }


def _is_inside(path: str, folder: str) -> bool:
    return f"{posixpath.normpath(path)}/".startswith(f"{folder.rstrip('/')}/")
