"""A small HTTP server that speaks the few requests of the Hugging Face hub and of Google Cloud Storage that we make.

    python tests/store_server.py FOLDER

serves the files of FOLDER as the repository org/model (one commit, which is also main) and as the objects of a bucket,
which can be written too, and prints its port.
org/gated, org/failing and the bucket `forbidden` (of S3 too) it refuses as the real ones do.
"""

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROUTES = (
    (r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "model_info"),
    (r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
    (r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "tree"),
    (r"/(?P<repo>org/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>[^/]+)", "content"),
    (r"/api/datasets/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "dataset_info"),
    (r"/api/datasets/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "dataset_tree"),
    (r"/api/datasets/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "dataset_paths"),
    (r"/datasets/(?P<repo>org/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "dataset_content"),
    (r"/forbidden", "s3_forbidden"),
    (r"/storage/v1/b/(?P<bucket>[^/]+)/o", "list_objects"),
    (r"/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<key>.+)", "object_info"),
    (r"/upload/storage/v1/b/(?P<bucket>[^/]+)/o", "upload"),
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlparse(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, url.path):
                return getattr(self, method)(**{key: unquote(value or "") for key, value in match.groupdict().items()})
        self.answer(404, b"")

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    # The hub

    def is_refused(self, repo: str, revision: str) -> bool:
        if repo == "org/gated":
            self.answer(403, b"", X_Error_Code="GatedRepo")
        elif repo == "org/failing":
            self.answer(500, b"")
        elif repo != "org/model":
            self.answer(404, b"", X_Error_Code="RepoNotFound")
        elif revision not in ("", "main", COMMIT):
            self.answer(404, b"", X_Error_Code="RevisionNotFound")
        else:
            return False
        return True

    def model_info(self, repo: str, revision: str) -> None:
        if not self.is_refused(repo, revision):
            siblings = [{"rfilename": p.name, "size": p.stat().st_size, "blobId": "0" * 40} for p in self.files()]
            siblings.append({"rfilename": "onnx/model.onnx", "size": 5, "blobId": "1" * 40})
            self.answer_json({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def tree(self, repo: str, revision: str) -> None:
        if not self.is_refused(repo, revision):
            files = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in self.files()]
            self.answer_json(files)

    def content(self, repo: str, revision: str, name: str) -> None:
        if not self.is_refused(repo, revision):
            self.send_file(self.folder / name, ETag=f'"{name}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

    # The hub's data sets: org/model is one too, with all files at any depth

    def dataset_info(self, repo: str, revision: str) -> None:
        if not self.is_refused(repo, revision):
            self.answer_json({"id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": []})

    def dataset_tree(self, repo: str, revision: str, path: str) -> None:
        if self.is_refused(repo, revision):
            return
        folder = self.folder / path
        if not folder.is_dir():
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        is_deep = self.query.get("recursive", "").lower() == "true"
        self.answer_json(
            [self.describe_entry(one) for one in sorted(folder.rglob("*") if is_deep else folder.iterdir())]
        )

    def dataset_paths(self, repo: str, revision: str) -> None:
        if not self.is_refused(repo, revision):
            asked = self.headers.get("Content-Type", "")
            names = json.loads(self.body)["paths"] if "json" in asked else parse_qs(self.body.decode())["paths"]
            found = [self.folder / name for name in ([names] if isinstance(names, str) else names)]
            self.answer_json([self.describe_entry(path) for path in found if path.exists()])

    def dataset_content(self, repo: str, revision: str, name: str) -> None:
        if not self.is_refused(repo, revision):
            self.send_file(self.folder / name, ETag=f'"{name}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

    def describe_entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}

    # S3

    def s3_forbidden(self) -> None:
        self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")

    # Google Cloud Storage: objects are the folder's files below models/a/, and those of its folders under their paths

    def describe(self, path: Path) -> dict[str, str]:
        size, time = str(path.stat().st_size), "2024-01-01T00:00:00Z"
        name = self.key_of(path)
        return {"kind": "storage#object", "name": name, "bucket": "b", "size": size, "generation": "1", "updated": time}

    def list_objects(self, bucket: str) -> None:
        if bucket == "forbidden":
            return self.answer(403, b'{"error": {"code": 403, "message": "no storage.objects.list access"}}')
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        items, prefixes = [], set()
        for path in paths:
            key = self.key_of(path)
            if not key.startswith(prefix):
                continue
            inner, slash, _ = key[len(prefix) :].partition("/")
            if delimiter and slash:
                prefixes.add(f"{prefix}{inner}/")
            else:
                items.append(self.describe(path))
        self.answer_json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def key_of(self, path: Path) -> str:
        return f"models/a/{path.name}" if path.parent == self.folder else path.relative_to(self.folder).as_posix()

    def path_of(self, key: str) -> Path:
        return self.folder / key.removeprefix("models/a/")

    def upload(self, bucket: str) -> None:
        """One request that opens a session, and one with the whole object."""
        if self.command == "POST":
            host = self.headers["Host"]
            name = self.query.get("name") or json.loads(self.body)["name"]
            location = f"http://{host}/upload/storage/v1/b/{bucket}/o?{urlencode({'name': name, 'upload_id': '1'})}"
            return self.answer(200, b"", Location=location)
        path = self.path_of(self.query["name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.body)
        self.answer_json(self.describe(path))

    def object_info(self, bucket: str, key: str) -> None:
        path = self.path_of(key)
        if not path.is_file():
            self.answer(404, b'{"error": {"code": 404, "message": "No such object"}}')
        elif self.query.get("alt") == "media":
            self.send_file(path, x_goog_generation="1")
        else:
            self.answer_json(self.describe(path))

    # All

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    def send_file(self, path: Path, **headers: str) -> None:
        data = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self.answer(200, data, **headers)
        first, last = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(206, data[first : last + 1], **headers)


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()
