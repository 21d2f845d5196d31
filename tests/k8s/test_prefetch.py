"""The prefetch Job's own command, run here against a hub of ours."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import PATIENCE_S
from rendered import K8S, render

MODEL = K8S.parent / "examples" / "tiny-phimoe"
WANTED = {path.name for path in MODEL.iterdir()}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """It has the small model as org/model, pickles beside it, and no other."""
    served = Path(shutil.copytree(MODEL, tmp_path / "served"))
    (served / "pytorch_model.bin").write_bytes(b"a pickle")
    command = [sys.executable, str(K8S.parent / "tests" / "store_server.py"), str(served)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.terminate()


def prefetch(hub: str, folder: Path, model: str) -> subprocess.CompletedProcess[str]:
    (job,) = (o for o in render(K8S / "overlays/aks/prefetch") if o["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    shell, flags, script = container["command"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"PATH": path, "HOME": str(folder), "HF_ENDPOINT": hub, "MODEL": model, "REVISION": "main"}
    command = [shell, flags, script.replace("/models/", f"{folder}/")]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)


def test_model_appears_when_it_is_whole(hub: str, tmp_path: Path) -> None:
    done = prefetch(hub, tmp_path, "org/model")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "model").iterdir()} == WANTED
    assert not (tmp_path / "model.partial").exists()
    again = prefetch("http://127.0.0.1:9", tmp_path, "org/model")
    assert (again.returncode, again.stdout) == (0, f"{tmp_path}/model is there already\n")


def test_failed_download_leaves_no_model(hub: str, tmp_path: Path) -> None:
    assert prefetch(hub, tmp_path, "org/other").returncode != 0
    assert not (tmp_path / "other").exists()
