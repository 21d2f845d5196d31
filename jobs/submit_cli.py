"""`moray submit`: a spec as a job of a Ray cluster, or as a RayJob on Kubernetes."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from engine.errors import UserError
from jobs.cluster_cli import MaybeAddress, Namespace, OnKubernetes, follow_log, need_address

if TYPE_CHECKING:
    from batch.spec import JobSpec

# Ray kills a job that was told to stop after 3 s, or after this: a shard in flight takes its time to commit.
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_S = 600

commands = typer.Typer()

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The job spec, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a field of the spec, as for run.")
]


@commands.command()
def submit(
    spec: SpecPath,
    address: MaybeAddress = None,
    set_: Overrides = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return as soon as the cluster has the job.")] = False,
    installed: Annotated[
        bool, typer.Option("--installed", help="Use the moray of the cluster's image instead of sending this one.")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="A variable for the job; without a value, the one it has here."),
    ] = None,
    kuberay: OnKubernetes = False,
    overlay: Annotated[
        str, typer.Option(metavar="NAME", help="With --kuberay: a cloud of k8s/overlays, or a folder.")
    ] = "aks",
    namespace: Namespace = "moray",
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="With --kuberay: REGISTRY/moray, in place of the overlay's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --kuberay: print what would be applied, and ask no cluster.")
    ] = False,
) -> None:
    """Run a job on a Ray cluster or, with --kuberay, on Kubernetes; or continue it.

    Without --detach, exit codes are those of run. On Kubernetes it returns as soon as the job is there, which runs the
    moray of the image.
    """
    from batch.spec import load_spec

    job = load_spec(spec, set_ or ())
    if kuberay:
        if env:
            raise UserError("--env is for --address; on Kubernetes variables come from the Secret moray-store")
        return _submit_to_kubernetes(job, overlay, namespace, image, dry_run=dry_run)
    if dry_run:
        raise UserError("--dry-run is for --kuberay; what a job would do is said by: moray plan SPEC")
    _submit_to_ray(job, need_address(address), env or (), detach=detach, installed=installed)


def _submit_to_ray(job: "JobSpec", address: str, env: Sequence[str], *, detach: bool, installed: bool) -> None:
    from jobs.cluster import Cluster
    from jobs.package import ENTRYPOINT, check_paths, stage

    check_paths(job)
    variables = {STOP_WAIT: str(STOP_WAIT_S)} | dict(map(read_variable, env))
    cluster = Cluster(address)
    with TemporaryDirectory(prefix="moray-") as folder:
        stage(job, Path(folder), with_code=not installed)
        submission = cluster.submit(job.name, job.output.path, ENTRYPOINT, Path(folder), variables)
    print(f"Submitted {submission.id} to {cluster.address}; output: {submission.output}", flush=True)
    if not detach:
        sys.exit(follow_log(cluster, submission))


def _submit_to_kubernetes(job: "JobSpec", overlay: str, namespace: str, image: str | None, *, dry_run: bool) -> None:
    from jobs.kuberay import KubeRay, render_job
    from jobs.rayjob import to_yaml

    if dry_run:
        print(to_yaml(render_job(job, overlay, namespace, image)), end="")
        return
    submission = KubeRay(namespace).submit(job, overlay, image)
    print(f"Created RayJob {submission.id} in namespace {namespace}; output: {submission.output}")


def read_variable(text: str) -> tuple[str, str]:
    """NAME=VALUE, or NAME with the value that it has here. Raises UserError where it has none."""
    name, equals, value = text.partition("=")
    if not equals and name not in os.environ:
        raise UserError(f"--env {name}: there is no such variable here; write {name}=VALUE")
    return name, value if equals else os.environ[name]
