"""The private parts of the installed Ray, each of which may move in its next version; and who may use them."""

import ast
import atexit
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import ray
from ray._private import worker

from moray.batch.runtime import ray_internals

ROOT = Path(__file__).parents[3]
PACKAGES = ("kernels", "engine", "batch", "serve", "jobs")
PRIVATE_METHODS = ("map_batches_internal", "iter_internal_ref_bundles")
# Variables that Ray documents for users, and those that moray only passes on or reports.
PUBLIC_VARIABLES = {
    "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH",
    "RAY_JOB_STOP_WAIT_TIME_S", "RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED", "RAY_USE_TLS",
    "RAY_DATA_", "RAY_memory_", "RAY_testing_", "RAY_JOB_CONFIG_", "RAY_RUNTIME_ENV_HOOK", "RAY_",
}  # fmt: skip

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from moray.batch.runtime import ray_internals
from moray.batch.runtime.ray_clusters import _is_refused

folder = sys.argv[1]
found = {}
ray_internals.set_environment(is_local=True)
import ray
import pyarrow as pa
from ray._private import auto_init_hook, worker
found["connects_by_itself"] = auto_init_hook.enable_auto_connect

handler = lambda number, frame: None
signal.signal(signal.SIGTERM, handler)
started, reports = [], []
ray_internals.redirect_reports(reports.append)
ray_internals.keep_sigterm_handler()
watched = ray_internals.watched_starts(lambda name, pid: started.append((name, pid)))
with watched, ray_internals.without_idle_daemons(), ray_internals.own_process_groups():
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
found["handler_is_kept"] = signal.getsignal(signal.SIGTERM) is handler
found["started"] = sorted(name for name, pid in started)
found["groups"] = [os.getpgid(pid) == pid for name, pid in started]
found["alive"] = all(Path(f"/proc/{pid}").exists() for name, pid in started)
worker.print_to_stdstream({"lines": ["a", "b"]}, ignore_prefix=True)
found["reports"] = list(reports)

address = ray_internals.gcs_address()
found["metadata"] = ray_internals.read_cluster_metadata(address, 5.0)
found["is_refused"] = _is_refused(address, None)
found["raylets"] = sum(f"--gcs-address={address}" in words for words in ray_internals.raylet_arguments())

ray_internals.silence_data_logs()
class Double:
    def __init__(self, config):
        self._factor = config["factor"]
    def __call__(self, block):
        assert isinstance(block, pa.Table) and block.num_rows == 3, block
        return pa.table({"x": [self._factor * value.as_py() for value in block["x"]]})
dataset = ray.data.from_arrow([pa.table({"x": [1, 2, 3]}), pa.table({"x": [4, 5, 6]})])
pool = ray.data.ActorPoolStrategy(size=1)
doubled = ray_internals.map_blocks(dataset, Double, {"factor": 2}, compute=pool, num_cpus=0.5)
found["blocks"] = sorted(block["x"].to_pylist() for block in ray_internals.iter_blocks(doubled))

@ray.remote(num_cpus=0)
class Named:
    def pid(self):
        return os.getpid()
named = Named.options(name="named").remote()
pid = ray.get(named.pid.remote())
found["named"] = [actor["Pid"] == pid for actor in ray_internals.list_actors() if actor["Name"] == "named"]

from ray import serve
found["has_serve"] = [ray_internals.has_serve()]
@serve.deployment(ray_actor_options={"num_cpus": 0})
class Answer:
    pass
serve.start(proxy_location="Disabled")
serve.run(Answer.bind(), name="app", route_prefix=None)
found["has_serve"].append(ray_internals.has_serve())
found["replicas"] = [len(ray_internals.list_replicas(name)) for name in ("app", "ap", "other")]
serve.shutdown()

killed = []
ray_internals.kill_at_shutdown(lambda: killed.append(ray.is_initialized()))
ray.shutdown(wait_for_processes=True)
found["killed"] = killed
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return what each function did in a process with a local Ray of its own."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, folder], env=bare | {"RAY_AUTH_MODE": "disabled"},
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_version_of_ray_is_the_one_that_was_read() -> None:
    version = ray.__version__.rpartition(".")[0]
    assert version == ray_internals.READ_IN, "read the private parts again in this Ray, then change READ_IN"


@pytest.mark.slow
def test_the_start_of_ray(found: dict[str, Any]) -> None:
    assert found["started"] == ["gcs_server", "raylet"] and found["alive"] and found["groups"] == [True, True]
    assert found["handler_is_kept"] and not found["connects_by_itself"]
    assert found["reports"] == ["a\nb"]


@pytest.mark.slow
def test_what_a_head_says(found: dict[str, Any]) -> None:
    assert found["metadata"]["ray_version"] == ray.__version__
    assert found["metadata"]["python_version"] == ".".join(map(str, sys.version_info[:3]))
    assert found["is_refused"] is False, "CHECK_ALIVE is answered"
    assert found["raylets"] == 1


@pytest.mark.slow
def test_blocks_go_whole_through_actors_of_ray_data(found: dict[str, Any]) -> None:
    assert found["blocks"] == [[2, 4, 6], [8, 10, 12]]


@pytest.mark.slow
def test_actors_and_replicas_are_listed(found: dict[str, Any]) -> None:
    assert found["named"] == [True]
    assert found["has_serve"] == [False, True]
    assert found["replicas"] == [1, 0, 0]


@pytest.mark.slow
def test_processes_are_killed_after_ray_has_disconnected(found: dict[str, Any]) -> None:
    assert found["killed"] == [False]


def test_the_shutdown_at_exit_is_the_one_that_ray_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[object] = []
    monkeypatch.setattr(atexit, "unregister", removed.append)
    ray_internals.skip_shutdown_at_exit()
    assert removed == [worker.shutdown]
    assert "atexit.register(shutdown, " in inspect.getsource(worker)


def test_variables_are_those_that_ray_reads() -> None:
    (binary,) = Path(ray.__file__).parent.glob("_raylet*.so")
    content = binary.read_bytes()
    for name in ("RAY_BACKEND_LOG_LEVEL", "task_events_report_interval_ms"):
        assert name.encode() in content, name


def test_a_variable_that_is_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ray_internals._QUIET | ray_internals._LOCAL:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "debug")
    ray_internals.set_environment(is_local=False)
    assert os.environ["RAY_BACKEND_LOG_LEVEL"] == "debug" and os.environ["RAY_ENABLE_AUTO_CONNECT"] == "0"
    assert "RAY_task_events_report_interval_ms" not in os.environ


def test_the_cluster_that_was_started_last_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert ray_internals.find_started_cluster() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:6379")
    assert ray_internals.find_started_cluster() == "127.0.0.1:6379"


def test_nobody_else_uses_what_is_private() -> None:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    others = [path for path in paths if path != Path(ray_internals.__file__).resolve()]
    assert len(others) == len(paths) - 1
    assert {str(path.relative_to(ROOT)): names for path in others if (names := private_names(path))} == {}


def private_names(path: Path) -> list[str]:
    """Return the private modules, methods and variables of Ray that a module names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names):
                found += [alias.name for alias in names if is_private(alias.name)]
            case ast.ImportFrom(str(module), names):
                full_names = [f"{module}.{alias.name}" for alias in names]
                found += [name for name in full_names if is_private(name)]
            case ast.Attribute(_, str(name)) if name in PRIVATE_METHODS:
                found.append(name)
            case ast.Constant(str(text)) if re.fullmatch(r"RAY_\w*", text) and text not in PUBLIC_VARIABLES:
                found.append(text)
    return found


def is_private(name: str) -> bool:
    return re.match(r"ray\..*(?<=\.)_|ray\._", name) is not None


def test_private_names_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import ray.data\nfrom ray import serve\nimport ray._private.node\nfrom ray import _raylet\n"
        "from ray.serve._private import common\ndataset.iter_internal_ref_bundles()\n"
        "variable = 'RAY_task_events_report_interval_ms'\naddress = 'RAY_ADDRESS'\n"
    )
    assert sorted(private_names(path)) == [
        "RAY_task_events_report_interval_ms",
        "iter_internal_ref_bundles",
        "ray._private.node",
        "ray._raylet",
        "ray.serve._private.common",
    ]
