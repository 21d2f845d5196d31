"""As much of Kubernetes' API as kubectl's get, apply, create and delete talk to: discovery, and objects in a dict.

What comes in is checked against the schemas, as a server with strict field validation does.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import core_schema
import yaml
from rendered import RAY_KINDS, Object
from test_manifests import schema_problems

HERE = "127.0.0.1"
# apiVersion -> plural -> kind, namespaced
RESOURCES: dict[str, dict[str, tuple[str, bool]]] = {
    "v1": {
        "namespaces": ("Namespace", False),
        "configmaps": ("ConfigMap", True),
        "serviceaccounts": ("ServiceAccount", True),
        "persistentvolumeclaims": ("PersistentVolumeClaim", True),
        "pods": ("Pod", True),
    },
    "networking.k8s.io/v1": {"networkpolicies": ("NetworkPolicy", True)},
    "policy/v1": {"poddisruptionbudgets": ("PodDisruptionBudget", True)},
    "scheduling.k8s.io/v1": {"priorityclasses": ("PriorityClass", False)},
    "ray.io/v1": {"rayjobs": ("RayJob", True)},
}


class SmallApi:
    """objects: path of its URL -> object, to be looked at and changed as an operator would."""

    def __init__(self, folder: Path) -> None:
        self.objects: dict[str, Object] = {}
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer((HERE, 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        cluster = {"name": "small", "cluster": {"server": f"http://{HERE}:{self._server.server_port}"}}
        context = {"name": "small", "context": {"cluster": "small", "user": "nobody"}}
        self.config = folder / "kubeconfig"
        self.config.write_text(
            yaml.safe_dump({
                "apiVersion": "v1", "kind": "Config", "current-context": "small", "clusters": [cluster],
                "contexts": [context], "users": [{"name": "nobody", "user": {}}],
            })
        )  # fmt: skip

    def __enter__(self) -> "SmallApi":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def of_kind(self, kind: str) -> list[Object]:
        return [o for o in self.objects.values() if o["kind"] == kind]

    def add(self, path: str, o: Object) -> None:
        self.objects[path] = o

    def answer(self, method: str, url: str, body: Any) -> tuple[int, Any]:
        with self._lock:
            parts = urlsplit(url)
            found = self._discovery(parts.path) if method == "GET" else None
            return (200, found) if found is not None else self._objects(method, parts.path, parse_qs(parts.query), body)

    def _discovery(self, path: str) -> Any:
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            versions = [{"groupVersion": v, "version": v.partition("/")[2]} for v in RESOURCES if "/" in v]
            groups = [
                {"name": v["groupVersion"].partition("/")[0], "versions": [v], "preferredVersion": v} for v in versions
            ]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        root = path.removeprefix("/apis/").removeprefix("/api/")
        if path == "/openapi/v3":
            roots = {_root(version): {"serverRelativeURL": f"/openapi/v3/{_root(version)}"} for version in RESOURCES}
            return {"paths": roots}
        if path.startswith("/openapi/v3/"):  # it says that the server itself validates fields
            version = root.removeprefix("/openapi/v3/").removeprefix("apis/").removeprefix("api/")
            patches = {
                f"/{kind}": {"patch": _takes_validation(version, kind)} for kind, _ in RESOURCES[version].values()
            }
            return {"openapi": "3.0.0", "info": {"title": "small", "version": "1"}, "paths": patches}
        if root in RESOURCES:
            verbs = ["get", "list", "create", "patch", "delete"]
            resources = [
                {"name": name, "singularName": "", "kind": kind, "namespaced": namespaced, "verbs": verbs}
                for name, (kind, namespaced) in RESOURCES[root].items()
            ]
            return {"kind": "APIResourceList", "groupVersion": root, "resources": resources}
        return None

    def _objects(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        plural = path.rpartition("/")[2]
        if method == "GET" and any(plural in resources for resources in RESOURCES.values()):
            wanted = dict(term.split("=") for term in query.get("labelSelector", [""])[0].split(",") if term)
            items = [o for at, o in self.objects.items() if at.rpartition("/")[0] == path and _has(o, wanted)]
            return 200, {"kind": "List", "apiVersion": "v1", "metadata": {}, "items": items}
        if method == "POST":
            path, plural = f"{path}/{body['metadata']['name']}", body["metadata"]["name"]
            if path in self.objects:
                return _failure(409, "AlreadyExists", f"{plural} already exists")
            number = len(self.objects)
            body["metadata"] |= {"uid": f"uid-{number}", "creationTimestamp": f"2026-11-22T06:00:{number % 60:02}Z"}
            return self._keep(path, body)
        if path not in self.objects:
            return _failure(404, "NotFound", f"{plural} not found")
        if method == "PATCH":
            return self._keep(path, _merge(self.objects[path], body))
        return 200, self.objects.pop(path) if method == "DELETE" else self.objects[path]

    def _keep(self, path: str, o: Object) -> tuple[int, Any]:
        checked = (o | {"metadata": {k: v for k, v in o["metadata"].items() if k not in ("uid", "creationTimestamp")}},)
        check = schema_problems if o["kind"] in RAY_KINDS else core_schema.problems
        if problems := check(checked):
            return _failure(400, "BadRequest", "; ".join(problems))
        self.objects[path] = o
        return 201, o

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                text = self.rfile.read(length)
                body = json.loads(text) if text else None
                status, answer = api.answer(self.command, self.path, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PATCH = do_DELETE = _serve

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _root(version: str) -> str:
    return f"apis/{version}" if "/" in version else f"api/{version}"


def _takes_validation(version: str, kind: str) -> Any:
    group, _, number = version.rpartition("/")
    return {
        "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
        "x-kubernetes-group-version-kind": {"group": group, "version": number, "kind": kind},
        "responses": {},
    }


def _has(o: Object, labels: dict[str, str]) -> bool:
    return labels.items() <= o["metadata"].get("labels", {}).items()


def _merge(old: Any, change: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(change, dict):
        return change
    merged = old | {key: _merge(old.get(key), value) for key, value in change.items()}
    return {key: value for key, value in merged.items() if value is not None}


def _failure(code: int, reason: str, message: str) -> tuple[int, Any]:
    about = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return code, about | {"message": message, "reason": reason, "code": code}
