"""Kubernetes as Ray's autoscaler sees it, and KubeRay as it answers: one RayCluster and its pods over HTTPS. A pod is a
`ray start` on this machine."""

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rendered import Object

RAY = Path(sys.executable).parent / "ray"
HERE = "127.0.0.1"
STORE_BYTES = 100 << 20  # what the manifests ask for is more than this machine has


class SmallKubernetes:
    """
    cluster:  a RayCluster as it is rendered
    env:      of all Ray processes
    folder:   for logs and the key

    history has, in order, the replicas of all groups whenever the autoscaler set them.
    """

    def __init__(self, cluster: Object, env: dict[str, str], folder: Path, gcs_port: int) -> None:
        self._cluster = cluster
        self._env = env
        self._folder = folder
        self._gcs = f"{HERE}:{gcs_port}"
        self._pods: dict[str, tuple[Object, subprocess.Popen[bytes]]] = {}
        self._lock = threading.RLock()
        self._is_over = threading.Event()
        self._count = 0
        self.history: list[dict[str, int]] = []
        for group in self._groups:
            group.setdefault("replicas", 0)  # the API server's default
        self._certificate = self._make_certificate()
        self._server = self._serve()

    def __enter__(self) -> "SmallKubernetes":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        port = self._gcs.partition(":")[2]
        head = self._cluster["spec"]["headGroupSpec"]
        self._start("headgroup", "head", {**head["rayStartParams"], "head": "", "port": port, "no-monitor": ""})
        self._await_head()
        threading.Thread(target=self._operate, daemon=True).start()
        self._autoscaler = self._popen(
            "autoscaler",
            ["kuberay-autoscaler", "--cluster-name=moray", "--cluster-namespace=moray", f"--gcs-address={self._gcs}"],
            {
                "KUBERNETES_SERVICE_HOST": HERE,
                "KUBERNETES_SERVICE_PORT": str(self._server.server_port),
                "KUBERNETES_SERVICE_PORT_HTTPS": str(self._server.server_port),
                "RAY_KUBERAY_CA_CERT_PATH": str(self._certificate),
                "RAY_KUBERAY_CLIENT_CERT_PATH": str(self._certificate),
                "RAY_KUBERAY_CLIENT_KEY_PATH": str(self._certificate),
                "KUBERAY_CRD_VER": "v1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            },
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._server.shutdown()
        self._server.server_close()
        _end(self._autoscaler)
        with self._lock:
            for _, process in reversed(self._pods.values()):
                _end(process)

    @property
    def replicas(self) -> dict[str, int]:
        return {group["groupName"]: group["replicas"] for group in self._groups}

    @property
    def workers(self) -> list[str]:
        """Names of the pods that are there, without the head's."""
        with self._lock:
            return [
                name
                for name, (pod, _) in self._pods.items()
                if pod["metadata"]["labels"]["ray.io/node-type"] == "worker"
            ]

    @property
    def _groups(self) -> list[Object]:
        return list(self._cluster["spec"]["workerGroupSpecs"])

    # As KubeRay does: pods that ended or are to go, then pods that are missing; one at a time, or the raylets of a busy
    # machine give up while they start.
    def _operate(self) -> None:
        while not self._is_over.wait(0.5):
            with self._lock:
                to_go = {name for group in self._groups for name in group["scaleStrategy"]["workersToDelete"]}
                for name, (_, process) in list(self._pods.items()):
                    if name in to_go or process.poll() is not None:
                        _end(self._pods.pop(name)[1])
                missing = [group for group in self._groups if self._count_of(group["groupName"]) < group["replicas"]]
                if missing and all(self._is_up(name) for name in self._pods):
                    self._start_worker(missing[0])

    def _count_of(self, group: str) -> int:
        return sum(pod["metadata"]["labels"]["ray.io/group"] == group for pod, _ in self._pods.values())

    def _is_up(self, name: str) -> bool:
        return "Ray runtime started" in (self._folder / f"{name}.log").read_text()

    def _start_worker(self, group: Object) -> None:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        params = {"num-cpus": limits["cpu"], "num-gpus": limits.get("nvidia.com/gpu", "0"), "address": self._gcs}
        if "labels" in group:
            params["labels"] = ",".join(f"{name}={value}" for name, value in group["labels"].items())
        if "resources" in group:
            params["resources"] = json.dumps({name: float(amount) for name, amount in group["resources"].items()})
        self._start(group["groupName"], "worker", group["rayStartParams"] | params)

    def _start(self, group: str, kind: str, params: dict[str, str]) -> None:
        self._count += 1
        name = f"moray-{group}-{self._count}"
        ours = {"node-ip-address": HERE, "object-store-memory": str(STORE_BYTES), "dashboard-agent-listen-port": "0"}
        if kind == "head":
            ours |= {"dashboard-host": HERE, "include-dashboard": "false", "temp-dir": str(self._folder / "ray")}
        flags = [f"--{key}={value}" if value else f"--{key}" for key, value in (params | ours).items()]
        process = self._popen(
            name, ["start", *flags, "--block"], {"RAY_CLOUD_INSTANCE_ID": name, "RAY_NODE_TYPE_NAME": group}
        )
        labels = {"ray.io/cluster": "moray", "ray.io/node-type": kind, "ray.io/group": group}
        status = {"podIP": HERE, "containerStatuses": [{"state": {"running": {}}}]}
        self._pods[name] = ({"metadata": {"name": name, "labels": labels}, "spec": {}, "status": status}, process)

    def _popen(self, name: str, arguments: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, RAY, *arguments],
                env=self._env | env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self._folder,
            )

    def _await_head(self) -> None:
        command = [sys.executable, RAY, "health-check", "--address", self._gcs]
        for _ in range(60):
            if subprocess.run(command, env=self._env, capture_output=True).returncode == 0:
                return
            time.sleep(0.5)
        raise TimeoutError(f"no head after a minute; logs are in {self._folder}")

    def _make_certificate(self) -> Path:
        path = self._folder / "api.pem"
        subject = ["-subj", f"/CN={HERE}", "-addext", f"subjectAltName=IP:{HERE}"]
        key = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", path, "-out", f"{path}.crt"]
        subprocess.run(["openssl", "req", *key, *subject], check=True, capture_output=True)
        path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
        return path

    def _serve(self) -> ThreadingHTTPServer:
        kubernetes = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(kubernetes.get(self.path.partition("?")[0]))

            def do_PATCH(self) -> None:
                length = int(self.headers["Content-Length"])
                self._answer(kubernetes.patch(json.loads(self.rfile.read(length))))

            def _answer(self, answer: Any) -> None:
                body = json.dumps(answer).encode()
                self.send_response(200 if answer is not None else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer((HERE, 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        return server

    def get(self, path: str) -> Any:
        with self._lock:
            if path.endswith("/rayclusters/moray"):
                return self._cluster
            if path.endswith("/pods"):
                return {"metadata": {"resourceVersion": "1"}, "items": [pod for pod, _ in self._pods.values()]}
            pod = self._pods.get(path.rpartition("/")[2])
            return pod[0] | {"metadata": pod[0]["metadata"] | {"resourceVersion": "1"}} if pod else None

    def patch(self, operations: list[Object]) -> Any:
        """JSON patch, of which the autoscaler uses `replace`: of what is there, or it is refused."""
        with self._lock:
            for operation in operations:
                assert operation["op"] == "replace", operation
                *parents, last = operation["path"].strip("/").split("/")
                holder: Any = self._cluster
                for key in parents:
                    holder = holder[int(key) if isinstance(holder, list) else key]
                assert last in holder, operation
                holder[last] = operation["value"]
            if not self.history or self.history[-1] != self.replicas:
                self.history.append(self.replicas)
            return self._cluster


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
