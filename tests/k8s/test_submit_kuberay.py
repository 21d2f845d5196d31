"""`moray submit --kuberay`: what it makes of a spec, checked as the overlays are, and applied by the real kubectl to a
small API."""

import copy
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rendered import K8S, Object, cluster_spec, kustomize, render
from small_api import SmallApi
from test_manifests import CHECKS
from typer.testing import CliRunner

from moray.batch.spec import JobSpec, load_spec
from moray.engine.errors import SpecError, UserError
from moray.jobs.cli import app
from moray.jobs.clusters.rayjob import make_rayjob, to_yaml
from moray.jobs.clusters.submission import next_label
from moray.jobs.clusters.worker_groups import node_of, place_workers

needs_kubectl = pytest.mark.skipif(kustomize() != ["kubectl", "kustomize"], reason="no kubectl on this machine")
PATHS = {
    "aks": ("/models/phixtral-4x2_8", "/data/prompts", "/data/answers"),
    "cpu": ("/opt/moray/examples/tiny-phimoe", "/opt/moray/examples/prompts", "/data/answers"),
    "eks": ("hf://org/model", "s3://b/prompts/*.parquet", "s3://b/answers"),
    "gke": ("gs://b/model", "gs://b/prompts", "gs://b/answers"),
}


def make(cloud: str = "aks", **sections: Any) -> JobSpec:
    model, source, output = PATHS[cloud]
    values: dict[str, Any] = {"model": {"path": model}, "input": {"path": source}, "output": {"path": output}}
    return JobSpec.model_validate(values | sections)


def moray(*arguments: str | Path) -> str:
    """Return what a command prints. Raises what it raises."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(make("aks", name="Sums & more", template={"prompt": "{prompt}\nIs it?"}).to_yaml())
    return path


@pytest.fixture(params=sorted(PATHS))
def submitted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, tuple[Object, ...]]:
    """(cloud, what --dry-run prints)."""
    path = tmp_path / "job.yaml"
    path.write_text(make(request.param, workers={"max": 3}).to_yaml())
    printed = moray("submit", path, "--kuberay", "--dry-run", "--overlay", request.param, "--set", "name=sums")
    return request.param, tuple(yaml.safe_load_all(printed))


@needs_kubectl
def test_what_is_printed_passes_all_checks(submitted: tuple[str, tuple[Object, ...]]) -> None:
    cloud, objects = submitted
    assert [problem for check in CHECKS.values() for problem in check(objects)] == []
    assert sorted(o["kind"] for o in objects) == sorted(o["kind"] for o in render(K8S / f"overlays/{cloud}/batch"))
    (job,) = (o for o in objects if o["kind"] == "RayJob")
    (config,) = (o for o in objects if o["kind"] == "ConfigMap")
    name = next_label("sums", PATHS[cloud][2], [])
    assert (job["metadata"]["name"], config["metadata"]["name"]) == (name, name)
    spec = JobSpec.model_validate(yaml.safe_load(config["data"]["job.yaml"]))
    assert (spec.name, spec.workers.max, spec.workers.gpus) == ("sums", 3, 0 if cloud == "cpu" else 1)
    groups = {group["groupName"]: group["maxReplicas"] for group in cluster_spec(job)["workerGroupSpecs"]}
    assert groups == ({"cpu": 3} if cloud == "cpu" else {"gpu": 3, "gpu-spot": 3, "cpu": 4})


@needs_kubectl
def test_groups_are_read_as_rays_autoscaler_reads_them(submitted: tuple[str, tuple[Object, ...]]) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    (job,) = (o for o in submitted[1] if o["kind"] == "RayJob")
    spec = cluster_spec(job)
    about = {"metadata": {"name": "moray", "namespace": "moray"}, "spec": spec}
    types = _derive_autoscaling_config_from_ray_cr(about)["available_node_types"]
    for group in spec["workerGroupSpecs"]:
        node, there = node_of(group), types[group["groupName"]]
        assert there["labels"] == node.labels
        assert {"GPU": 0} | there["resources"] == node.resources | {"memory": there["resources"]["memory"]}


@needs_kubectl
def test_workers_choose_among_groups() -> None:
    def placed(**workers: Any) -> tuple[JobSpec, dict[str, Object]]:
        (job,) = (copy.deepcopy(o) for o in render(K8S / "overlays/aks/batch") if o["kind"] == "RayJob")
        groups = cluster_spec(job)["workerGroupSpecs"]
        spec = place_workers(make(workers=workers, engine={"kv_cache_memory": "1GiB"}), groups)
        return spec, {group["groupName"]: group for group in groups}

    def replicas(**workers: Any) -> dict[str, int]:
        return {name: group["maxReplicas"] for name, group in placed(**workers)[1].items()}

    assert placed()[0].workers.max == 8
    assert replicas(max=20, accelerator="A100") == {"gpu": 20, "cpu": 4, "gpu-spot": 20}
    assert replicas(gpus=0.5, max=5) == {"gpu": 3, "cpu": 4, "gpu-spot": 3}
    assert replicas(min=9) == {"gpu": 9, "cpu": 4, "gpu-spot": 9}
    assert replicas(gpus=0, cpus=4, max=2) == {"gpu": 8, "cpu": 2, "gpu-spot": 8}
    assert replicas(max=2, labels={"ray.io/market-type": "spot"}) == {"gpu": 8, "cpu": 4, "gpu-spot": 2}
    spec, groups = placed(labels={"team": "a"}, io_labels={"ray.io/node-group": "cpu", "disk": "fast"}, max="auto")
    assert (groups["gpu"]["labels"]["team"], groups["gpu-spot"]["labels"]["team"]) == ("a", "a")
    assert groups["cpu"]["labels"] == {"ray.io/node-group": "cpu", "disk": "fast"}
    assert (spec.workers.labels, spec.workers.gpus) == ({"team": "a"}, 1)


@needs_kubectl
def test_workers_of_several_gpus() -> None:
    def placed(cloud: str, **sections: Any) -> tuple[float, int, int]:
        (job,) = (copy.deepcopy(o) for o in render(K8S / f"overlays/{cloud}/batch") if o["kind"] == "RayJob")
        groups = cluster_spec(job)["workerGroupSpecs"]
        spec = place_workers(make(**sections), groups)
        assert isinstance(spec.workers.gpus, float) and isinstance(spec.workers.max, int)
        return spec.workers.gpus, spec.workers.max, groups[0]["maxReplicas"]

    assert placed("aks-8gpu", workers={"gpus": 8}) == (8, 1, 1)
    assert placed("aks-8gpu", workers={"gpus": 2, "max": 6}) == (2, 6, 2)  # four workers in a pod
    assert placed("aks-4gpu", workers={"gpus": 2}) == (2, 4, 2)
    assert placed("aks-2gpu", engine={"tensor_parallel": 2}) == (2, 4, 4)
    with pytest.raises(SpecError, match="workers: no group of the overlay has 4 GPUs and 1 CPUs; its groups: gpu "):
        placed("aks-2gpu", workers={"gpus": 4})


@needs_kubectl
@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({"accelerator": "H200"}, "workers: no group of the overlay has 1 GPU (H200) and 1 CPUs; its groups: gpu (11 "),
        ({"gpus": 1, "cpus": 12}, "workers: no group of the overlay has 1 GPU and 12 CPUs"),
        ({"labels": {"ray.io/node-group": "big"}}, "workers: no group of the overlay has 1 GPU and 1 CPUs and the lab"),
        ({"io_labels": {"disk": "in(a, b)"}}, "workers.io_labels: no group of the overlay has"),
    ],
)
def test_workers_that_fit_no_group(workers: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as wrong:
        make_rayjob(render(K8S / "overlays/aks/batch"), make(workers=workers), "a")
    assert str(wrong.value).startswith(message) and "ray.io/market-type=spot" in str(wrong.value)


@needs_kubectl
def test_paths_that_pods_do_not_see() -> None:
    spec = make(
        model={"path": "examples/tiny-phimoe"},
        input={"path": ["/data/../etc/in", "hf://a/b", "/data/in"]},
        output={"path": "/models/out"},
    )
    with pytest.raises(SpecError) as wrong:
        make_rayjob(render(K8S / "overlays/aks/batch"), spec, "a")
    assert str(wrong.value).splitlines() == [
        "model.path: not every pod can reach 'examples/tiny-phimoe'; give s3://, gs://, hf://, or a path in "
        "/data, /models, /opt/moray",
        "input.path: not every pod can reach '/data/../etc/in'; give s3://, gs://, or a path in /data, "
        "/models, /opt/moray",
        "input.path: not every pod can reach 'hf://a/b'; give s3://, gs://, or a path in /data, /models, /opt/moray",
        "output.path: not every pod can reach '/models/out'; give s3://, gs://, or a path in /data",
    ]


@needs_kubectl
def test_namespace_and_image(spec_file: Path) -> None:
    def images(given: str) -> list[str]:
        printed = moray("submit", spec_file, "--kuberay", "--dry-run", "--namespace", "team-a", "--image", given)
        objects = list(yaml.safe_load_all(printed))
        assert {o["metadata"].get("namespace", "team-a") for o in objects} == {"team-a"}
        assert [o["metadata"]["name"] for o in objects if o["kind"] == "Namespace"] == ["team-a"]
        (job,) = (o for o in objects if o["kind"] == "RayJob")
        spec = cluster_spec(job)
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        return [group["template"]["spec"]["containers"][0]["image"] for group in groups]

    there = "host:5000/a/our-moray"
    assert images(there) == [f"{there}:0.1.0-{kind}" for kind in ("cpu", "cuda", "cpu", "cuda")]
    assert images(f"{there}:7") == [f"{there}:7"] * 4


@needs_kubectl
def test_an_overlay_of_ones_own(tmp_path: Path, spec_file: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    base = os.path.relpath(K8S / "overlays/aks/batch", own)
    (own / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [base]}))
    assert "kind: RayJob" in moray("submit", spec_file, "--kuberay", "--dry-run", "--overlay", own)
    with pytest.raises(UserError, match=r"must be a folder with .*, or one of aks, aks-2gpu, .*, gke; is 'azure'"):
        moray("submit", spec_file, "--kuberay", "--dry-run", "--overlay", "azure")
    with pytest.raises(UserError, match="renders exactly one RayJob, this one 0"):
        moray("submit", spec_file, "--kuberay", "--dry-run", "--overlay", K8S / "overlays/aks/pool")


def test_names_are_labels_that_kuberay_takes() -> None:
    assert next_label("Sums & more", "s3://b/out/", []) == "sums-more-a23f8375-1"
    assert next_label("4x2", "s3://b/out", ["sums-more-a23f8375-9"]) == "job-4x2-a23f8375-10"
    assert next_label("été", "s3://b/out", []) == "t-a23f8375-1"
    assert next_label("!", "s3://b/out", []) == "job-a23f8375-1"
    assert len(next_label("a" * 99, "s3://b/out", ["a-998"])) == 47


def test_what_belongs_to_another_way_is_refused(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    for arguments, message in (
        (("--dry-run",), "--dry-run is for --kuberay"),
        (("--kuberay", "--env", "A=1"), "--env is for --address"),
        ((), r"no cluster given: set the Ray cluster's --address \(or RAY_API_SERVER_ADDRESS\), or --kuberay"),
    ):
        with pytest.raises(UserError, match=message):
            moray("submit", spec_file, *arguments)


def test_without_kubectl(spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no kubectl on the PATH; --kuberay renders and applies with it"):
        moray("submit", spec_file, "--kuberay", "--dry-run")


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallApi]:
    with SmallApi(tmp_path) as small:
        monkeypatch.setenv("KUBECONFIG", str(small.config))
        monkeypatch.setenv("HOME", str(tmp_path))  # where kubectl keeps what it found
        yield small


AT = ("--kuberay", "--namespace", "team-a")
IMAGE = ("--image", "registry.test/moray")


@needs_kubectl
def test_submit_and_submit_again(api: SmallApi, spec_file: Path) -> None:
    with pytest.raises(UserError, match=r"the overlay's image is registry.example.com/moray:0.1.0-cpu, an example"):
        moray("submit", spec_file, *AT)
    assert api.objects == {}
    name = next_label("Sums & more", "/data/answers", [])
    assert moray("submit", spec_file, *AT, *IMAGE) == (
        f"Created RayJob {name} in namespace team-a; output: /data/answers\n"
    )
    assert {o["metadata"].get("namespace") for o in api.objects.values()} == {"team-a", None}
    (config,) = api.of_kind("ConfigMap")
    assert load_spec_text(config["data"]["job.yaml"]).template.prompt == "{prompt}\nIs it?"
    with pytest.raises(
        UserError, match=f"^/data/answers is being written by {name}. Follow it: moray logs {name} --kub"
    ):
        moray("submit", spec_file, *AT, *IMAGE)

    (job,) = api.of_kind("RayJob")
    job["status"] = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}
    before = len(api.objects)
    assert f"{name[:-1]}2 " in moray("submit", spec_file, *AT, *IMAGE)
    assert len(api.objects) == before + 2  # all else was there
    listed = moray("list", *AT)
    assert [line.split()[:2] for line in listed.splitlines()[2:]] == [[f"{name[:-1]}2", "PENDING"], [name, "FAILED"]]


def load_spec_text(text: str) -> JobSpec:
    return JobSpec.model_validate(yaml.safe_load(text))


@needs_kubectl
def test_a_mistake_that_the_api_finds(api: SmallApi, spec_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    patch = '[{"op": "add", "path": "/spec/backofLimit", "value": 2}]'
    (own / "kustomization.yaml").write_text(
        yaml.safe_dump({
            "resources": [os.path.relpath(K8S / "overlays/aks/batch", own)],
            "patches": [{"target": {"kind": "RayJob"}, "patch": patch}],
        })
    )  # fmt: skip
    with pytest.raises(UserError, match=r"kubectl create: (.|\n)*backofLimit"):
        moray("submit", spec_file, *AT, *IMAGE, "--overlay", own)


@needs_kubectl
def test_logs_and_cancel(api: SmallApi, spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exec needs a node's container runtime; here a script stands for it, and writes down what it was asked."""
    (tmp_path / "bin").mkdir()
    script, asked = tmp_path / "bin/kubectl", tmp_path / "asked"
    script.write_text(f'#!/bin/sh\n[ "$1" = exec ] && echo "$@" >> {asked} || exec {shutil.which("kubectl")} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")

    created = moray("submit", spec_file, *AT, *IMAGE).split()[2]
    with pytest.raises(UserError, match=f"{created} has no running head pod .*: moray status /data/answers"):
        moray("logs", "Sums & more", *AT)
    assert moray("cancel", created, *AT).endswith(f"\n{created} is deleted: it did not run\n")
    moray("submit", spec_file, *AT, *IMAGE)
    api.of_kind("RayJob")[0]["status"] = {"jobDeploymentStatus": "Suspended", "jobStatus": "STOPPED"}
    assert "is deleted: it did not run" in moray("cancel", "Sums & more", *AT)
    assert api.of_kind("RayJob") == []

    again = moray("submit", spec_file, *AT, *IMAGE).split()[2]
    (job,) = api.of_kind("RayJob")
    job["status"] = {
        "jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "jobId": "moray-x7", "rayClusterName": "moray-k2"
    }  # fmt: skip
    labels = {"ray.io/cluster": "moray-k2", "ray.io/node-type": "head"}
    head = {"metadata": {"name": "moray-k2-head", "labels": labels}, "status": {"phase": "Running"}}
    api.add("/api/v1/namespaces/team-a/pods/moray-k2-head", {"apiVersion": "v1", "kind": "Pod"} | head)
    moray("logs", "/data/answers", "--follow", *AT)
    assert moray("cancel", "Sums & more", *AT).endswith(f"\n{again} has ended: moray status /data/answers\n")
    where = "exec moray-k2-head --namespace=team-a --container=ray-head -- ray job"
    assert asked.read_text().splitlines() == [
        f"{where} logs --address=http://127.0.0.1:8265 --follow moray-x7",
        f"{where} stop --address=http://127.0.0.1:8265 moray-x7",
    ]
    job["status"] |= {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}
    assert moray("cancel", again, *AT) == f"{again} is over already: STOPPED\n"


def test_yaml_is_what_both_versions_of_yaml_read(tmp_path: Path) -> None:
    """Kubernetes reads `1234e567` as a number, which no label may be."""
    text = to_yaml([{"metadata": {"labels": {"a": "1234e567", "b": "on"}}, "data": {"job.yaml": "a: 1\nb: 2\n"}}])
    assert text == "metadata:\n  labels:\n    a: '1234e567'\n    b: 'on'\ndata:\n  job.yaml: |\n    a: 1\n    b: 2\n"
    path = tmp_path / "job.yaml"
    path.write_text(make(template={"prompt": " {prompt}\n\n\tand: more \n"}).to_yaml())
    assert load_spec(path).template.prompt == " {prompt}\n\n\tand: more \n"
