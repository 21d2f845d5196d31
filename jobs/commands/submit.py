"""`moray submit`: run a spec as a job of a Ray cluster, or as a RayJob on Kubernetes."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from moray.engine.errors import UserError
from moray.jobs.commands.cluster import MaybeAddress, Namespace, OnKubernetes, follow_log, require_address
from moray.jobs.commands.spec_arguments import Overrides, SpecPath

if TYPE_CHECKING:
    from moray.batch.spec import JobSpec

# The time between Ray's request to stop a job and its kill, by default 3 s: shards in flight need longer to commit.
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_S = 600

commands = typer.Typer()


@commands.command()
def submit(
    spec: SpecPath,
    address: MaybeAddress = None,
    set_: Overrides = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return as soon as the job is submitted.")] = False,
    installed: Annotated[
        bool, typer.Option("--installed", help="Use the moray installed on the cluster instead of uploading this one.")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]", help="Environment variable for the job; without VALUE, its value here. Repeatable."
        ),
    ] = None,
    kuberay: OnKubernetes = False,
    overlay: Annotated[
        str, typer.Option(metavar="NAME", help="Kustomize overlay, with --kuberay: one of k8s/overlays, or a folder.")
    ] = "aks",
    namespace: Namespace = "moray",
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Image, with --kuberay: REGISTRY/moray. Default: the overlay's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the RayJob's YAML, with --kuberay, and contact no cluster.")
    ] = False,
) -> None:
    """Submit a job to a Ray cluster or, with --kuberay, to Kubernetes; or resume it.

    Without --detach it streams the log and exits with the job's exit code. On Kubernetes it returns as soon as the
    RayJob is created, which runs the moray of the image.
    """
    from moray.batch.spec import load_spec

    job = load_spec(spec, set_ or ())
    if kuberay:
        if env:
            raise UserError("--env is for --address; on Kubernetes variables come from the Secret moray-store")
        return _submit_to_kubernetes(job, overlay, namespace, image, dry_run=dry_run)
    if dry_run:
        raise UserError("--dry-run is for --kuberay; to see what a job would do: moray plan SPEC")
    _submit_to_ray(job, require_address(address), env or (), detach=detach, installed=installed)


def _submit_to_ray(job: "JobSpec", address: str, env: Sequence[str], *, detach: bool, installed: bool) -> None:
    from moray.jobs.clusters.job_package import ENTRYPOINT, check_paths, stage
    from moray.jobs.clusters.ray_jobs import RayCluster

    check_paths(job)
    variables = {STOP_WAIT: str(STOP_WAIT_S)} | dict(map(read_variable, env))
    cluster = RayCluster(address)
    with TemporaryDirectory(prefix="moray-") as folder:
        stage(job, Path(folder), with_code=not installed)
        submission = cluster.submit(job.name, job.output.path, ENTRYPOINT, Path(folder), variables)
    print(f"Submitted {submission.id} to {cluster.address}; output: {submission.output}", flush=True)
    if not detach:
        sys.exit(follow_log(cluster, submission))


def _submit_to_kubernetes(job: "JobSpec", overlay: str, namespace: str, image: str | None, *, dry_run: bool) -> None:
    from moray.jobs.clusters.kuberay import KubeRay, render_job
    from moray.jobs.clusters.rayjob import to_yaml

    if dry_run:
        print(to_yaml(render_job(job, overlay, namespace, image)), end="")
        return
    submission = KubeRay(namespace).submit(job, overlay, image)
    print(f"Created RayJob {submission.id} in namespace {namespace}; output: {submission.output}")


def read_variable(text: str) -> tuple[str, str]:
    """Parse NAME=VALUE, or NAME, which has its value here. Raises UserError where it has none."""
    name, equals, value = text.partition("=")
    if not equals and name not in os.environ:
        raise UserError(f"--env {name}: there is no such variable here; write {name}=VALUE")
    return name, value if equals else os.environ[name]
