"""GPUs: one by one as a table, and all of it with a library that answers as NVIDIA's does."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from doctor_run import Answer, ask_section

from moray.jobs.doctor import gpu
from moray.jobs.doctor.finding import Subject, Verdict
from moray.jobs.doctor.gpu import check_gpu
from moray.jobs.doctor.nvml import AMD, COMPUTE_CLASSES, NVIDIA, NvmlGpu, gpus_on_bus

H200 = NvmlGpu("NVIDIA H200", (9, 0), 140 << 30, 139 << 30)


@pytest.mark.parametrize(
    ("device", "verdict", "words"),
    [
        (H200, Verdict.OK, "NVIDIA H200, capability 9.0, 139.0 GiB of 140.0 GiB free"),
        (replace(H200, capability=(8, 0)), Verdict.OK, "capability 8.0"),
        (replace(H200, capability=(7, 0)), Verdict.PROBLEM, "the kernels need 7.5"),
        (replace(H200, capability=(7, 5)), Verdict.WARNING, "it has no bfloat16"),
        (replace(H200, is_split=True), Verdict.WARNING, "split by MIG"),
        (replace(H200, is_prohibited=True), Verdict.PROBLEM, "compute mode is Prohibited"),
        (replace(H200, free_bytes=100 << 30), Verdict.WARNING, "other processes hold the rest"),
    ],
)
def test_a_gpu(device: NvmlGpu, verdict: Verdict, words: str) -> None:
    finding = check_gpu(device, "GPU 0")
    assert finding.verdict == verdict and words in finding.value
    assert (finding.fix is None) == (verdict is Verdict.OK)


def test_gpus_on_the_bus(tmp_path: Path) -> None:
    for name, vendor, kind in (
        ("0", NVIDIA, "0x030200"),
        ("1", NVIDIA, "0x040300"),  # the audio device of a GPU
        ("2", AMD, "0x030000"),  # a processor's own graphics
        ("3", AMD, "0x120000"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    (tmp_path / "4").mkdir()
    assert gpus_on_bus(NVIDIA, bus=tmp_path) == 1
    assert gpus_on_bus(AMD, COMPUTE_CLASSES, bus=tmp_path) == 1
    assert gpus_on_bus(NVIDIA, bus=tmp_path / "none") == 0


def test_amd_gpus_are_a_problem_where_ray_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MORAY_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu, "read_driver", lambda: None)
    monkeypatch.setattr(gpu, "gpus_on_bus", lambda vendor, classes=(): 2 if vendor == AMD else 0)
    for package, verdict in (("no_such_package", Verdict.WARNING), ("json", Verdict.PROBLEM)):
        monkeypatch.setattr(gpu, "AMD_PACKAGE", package)
        (found,) = gpu.devices(Subject())
        assert found.verdict == verdict and found.value.startswith("2 of AMD, which moray "), found
    monkeypatch.setenv("MORAY_DEVICE", "cpu")
    assert [found.verdict for found in gpu.devices(Subject())] == [Verdict.WARNING]


def without_driver() -> bool:
    return not torch.cuda.is_available() and shutil.which("nvidia-smi") is None


@pytest.mark.skipif(not without_driver(), reason="there is a driver")
def test_a_machine_without_gpus() -> None:
    answer = ask_section("GPU")
    assert [(name, one["verdict"]) for (section, name), (one,) in answer.findings.items() if section == "GPU"] == [
        ("devices", "ok")
    ]
    assert answer.one("GPU", "devices")["value"] == "none; the CPU is used"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or not without_driver():
        pytest.skip("no C compiler, or a real driver")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("nvml.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", source], check=True)
    return folder


def ask_with(library: Path, **variables: str) -> Answer:
    return ask_section("GPU", LD_LIBRARY_PATH=str(library), **variables)


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA here")
def test_gpus_and_a_torch_that_is_built_for_the_cpu(library: Path) -> None:
    answer = ask_with(library, NVML_MIG="1")
    assert answer.code == 1
    assert answer.one("GPU", "devices")["value"] == "2, driver 550.54.15, which supports CUDA 12.4"
    assert answer.one("GPU", "GPU 0")["verdict"] == "warning" and "MIG" in answer.one("GPU", "GPU 0")["fix"]
    assert answer.one("GPU", "GPU 1")["verdict"] == "warning"
    assert answer.one("GPU", "GPU 1")["value"].startswith("Tesla T4, capability 7.5, 14.8 GiB of 15.0 GiB free: ")
    assert "is built without CUDA, so the GPUs stay idle" in answer.one("GPU", "torch")["value"]
    assert answer.one("GPU", "compiler")["verdict"] == "ok"


def test_a_machine_whose_compiler_is_missing(library: Path, tmp_path: Path) -> None:
    answer = ask_with(library, PATH=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path))
    assert answer.one("GPU", "compiler")["verdict"] == "problem"
    assert "no C compiler (gcc or clang)" in answer.one("GPU", "compiler")["value"]
    assert answer.one("GPU", "compiler")["fix"].startswith("apt-get install gcc")


@pytest.mark.parametrize(("variable", "value"), [("CUDA_VISIBLE_DEVICES", ""), ("MORAY_DEVICE", "cpu")])
def test_gpus_that_are_not_wanted(library: Path, variable: str, value: str) -> None:
    answer = ask_with(library, **{variable: value})
    assert (answer.problems(), answer.code) == ([], 0)
    assert f"2, but the CPU is used: {variable}={value}; driver" in answer.one("GPU", "devices")["value"]


def test_a_driver_that_does_not_work(library: Path) -> None:
    (problem,) = ask_with(library, NVML_FAILS="1").problems()
    assert problem["value"] == "NVIDIA's driver does not work: Driver/library version mismatch"
