"""What Ray itself, and moray, make of the manifests: their own parsers read them."""

import re

import pytest
import yaml
from rendered import K8S, WITH_CLUSTER, Object, cluster_spec, clusters, render

from moray.batch.spec import JobSpec

BATCH, SERVICE = ([name for name in WITH_CLUSTER if name.endswith(kind)] for kind in ("batch", "service"))


@pytest.mark.parametrize("folder", WITH_CLUSTER)
def test_autoscaler_takes_the_groups(folder: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    (spec,) = clusters(render(K8S / folder))
    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "moray", "namespace": "moray"}, "spec": spec})
    types = config["available_node_types"]
    head = types.pop("headgroup")
    assert (head["resources"]["CPU"], head["resources"].get("GPU", 0), head["max_workers"]) == (0, 0, 0)
    assert config["idle_timeout_minutes"] == 1.0
    for name, group in types.items():
        assert (group["min_workers"], group["resources"].get("GPU", 0)) == (0, 0 if name == "cpu" else gpus_of(folder))
        assert 1 <= group["max_workers"] <= 8
        assert group["idle_timeout_s"] == (60.0 if name == "cpu" else 300.0)
        # What a job may choose by: of a group without pods Ray knows no more.
        assert group["labels"]["ray.io/node-group"] == name
        gpus = [resource for resource in group["resources"] if resource.startswith("accelerator_type:")]
        assert len(gpus) == (0 if name == "cpu" else 1)
    if "gpu-spot" in types:
        assert types["gpu-spot"]["priority"] > types["gpu"]["priority"]
    assert set(types) == ({"cpu"} if "cpu" in folder else {"gpu", "cpu", *spot(folder)})


def gpus_of(folder: str) -> int:
    """The GPUs of a pod: `overlays/aks-4gpu/batch` has four."""
    found = re.search(r"-(\d)gpu/", folder)
    return int(found[1]) if found else 1


def spot(folder: str) -> set[str]:
    """An endpoint's replicas are not to be taken away."""
    return set() if folder.endswith("service") else {"gpu-spot"}


@pytest.mark.parametrize("folder", BATCH)
def test_job_spec_fits_the_cluster(folder: str) -> None:
    objects = render(K8S / folder)
    (config,) = (o for o in objects if o["kind"] == "ConfigMap")
    spec = JobSpec.model_validate(yaml.safe_load(config["data"]["job.yaml"]))
    (cluster,) = clusters(objects)
    group = cluster["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert spec.workers.gpus == int(limits.get("nvidia.com/gpu", 0))
    assert spec.workers.max == group["maxReplicas"]
    assert spec.workers.cpus <= int(limits["cpu"])
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    mounts = [mount["mountPath"] for mount in head["volumeMounts"]]
    for path in (spec.model.path, spec.input.path, spec.output.path):
        is_mounted = any(path.startswith(f"{mount}/") for mount in mounts)
        assert is_mounted or path.startswith(("s3://", "gs://", "/opt/moray/")), path


def serve_config(folder: str) -> tuple[Object, Object]:
    (o,) = (o for o in render(K8S / folder) if o["kind"] == "RayService")
    return yaml.safe_load(o["spec"]["serveConfigV2"]), cluster_spec(o)


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments")  # Ray's, when it is imported
@pytest.mark.parametrize("folder", SERVICE)
def test_serve_takes_its_config(folder: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config, cluster = serve_config(folder)
    (application,) = ServeDeploySchema(**config).applications
    container = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    limits = container["resources"]["limits"]
    assert application.args["num_gpus"] == int(limits.get("nvidia.com/gpu", 0))
    assert application.args["num_cpus"] <= int(limits["cpu"])
    assert application.args["max_replicas"] <= cluster["workerGroupSpecs"][0]["maxReplicas"]
    assert config["http_options"]["port"] in [port["containerPort"] for port in container["ports"]]
    assert "/etc/moray/keys" in [mount["mountPath"] for mount in container["volumeMounts"]]


@pytest.mark.parametrize("folder", SERVICE)
def test_endpoint_takes_its_args(folder: str) -> None:
    args = pytest.importorskip("moray.serve.args")
    (application,) = serve_config(folder)[0]["applications"]
    assert args.EndpointArgs(**application["args"]).keys_file.startswith("/etc/moray/keys/")


@pytest.mark.parametrize("folder", SERVICE)
def test_old_cluster_outlives_its_requests(folder: str) -> None:
    (o,) = (o for o in render(K8S / folder) if o["kind"] == "RayService")
    (application,) = serve_config(folder)[0]["applications"]
    assert o["spec"]["rayClusterDeletionDelaySeconds"] > application["args"]["drain_timeout_s"]


def test_runtime_env_is_one_that_ray_takes() -> None:
    """Were there one: the operator looks at the YAML alone."""
    from ray.runtime_env import RuntimeEnv

    for folder in BATCH:
        (job,) = (o for o in render(K8S / folder) if o["kind"] == "RayJob")
        assert set(RuntimeEnv(**yaml.safe_load(job["spec"].get("runtimeEnvYAML", "{}")))) <= {"env_vars"}
    with pytest.raises((TypeError, ValueError)):
        RuntimeEnv(**yaml.safe_load("env_vars: {RAY_LOG_LEVEL: 1}"))


@pytest.mark.parametrize("cloud", ["aks", "aks-2gpu", "aks-4gpu", "aks-8gpu"])
def test_prefetch_brings_the_model_that_is_served_and_run(cloud: str) -> None:
    (job,) = (o for o in render(K8S / f"overlays/{cloud}/prefetch") if o["kind"] == "Job")
    env = {entry["name"]: entry["value"] for entry in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    folder = f"/models/{env['MODEL'].rpartition('/')[2]}"
    (application,) = serve_config(f"overlays/{cloud}/service")[0]["applications"]
    assert application["args"]["model"] == folder
    (config,) = (o for o in render(K8S / f"overlays/{cloud}/batch") if o["kind"] == "ConfigMap")
    assert yaml.safe_load(config["data"]["job.yaml"])["model"]["path"] == folder
