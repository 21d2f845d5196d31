"""The endpoint's application with batches and without."""

import os
import warnings
from pathlib import Path

from moray.jobs.commands.serve import read_args
from moray.serve.args import EndpointArgs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve uses what is deprecated in pydantic
    from moray.jobs import app


def deployments(args: EndpointArgs) -> list[str]:
    """The names of the deployments of an application: the ingress, and those that it is bound to."""
    root = app.build(args)._bound_deployment
    bound = [one._bound_deployment.name for one in root.init_args if hasattr(one, "_bound_deployment")]
    return [root.name, *bound]


def test_the_coordinator_is_a_deployment_of_its_own(tmp_path: Path) -> None:
    assert deployments(EndpointArgs(model="m")) == ["moray"]
    assert deployments(EndpointArgs(model="m", batch_store=str(tmp_path))) == ["moray", "batches"]


def test_a_store_is_found_from_any_folder() -> None:
    assert read_args("m", "auto", [], "some/store").batch_store == os.path.abspath("some/store")
    assert read_args("m", "auto", ["batch_store=s3://bucket/a"]).batch_store == "s3://bucket/a"
    assert read_args("m", "auto", []).batch_store is None
