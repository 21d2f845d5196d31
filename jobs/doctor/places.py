"""Find the file system of a folder, test whether files can be published there, and suggest fixes for denied access."""

import os
import uuid
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")


# scheme -> what to try where its files cannot be read or written, with the tool that most people have
_FIXES = {
    "s3": "try aws s3 ls {path}/ here: it must list the files; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "AWS_PROFILE, to an account that may {use} them, and AWS_ENDPOINT_URL where the store is not Amazon's",
    "gs": "try gcloud storage ls {path}/ here: it must list the files; set GOOGLE_APPLICATION_CREDENTIALS to the key "
    "file of an account that may {use} them",
    "hf": "open {hub}/{repo} in a browser: check the name there, accept its terms where it asks for that, and set "
    "HF_TOKEN to a token that may {use} it; without a network, fetch it elsewhere and give its folder",
}


def access_fix(path: str, use: str) -> str:
    """Return what to do where files in a store, or a model on the hub, cannot be used.

    use: what should be possible, `read` or `write`
    """
    scheme, _, name = path.rstrip("/").partition("://")
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if scheme not in _FIXES:
        return "name a folder that exists and may be read"
    name = name.removeprefix("anonymous@")
    return _FIXES[scheme].format(path=f"{scheme}://{name}", use=use, hub=hub.rstrip("/"), repo=name.partition("@")[0])


def nearest_folder(path: str | Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    absolute = Path(os.path.abspath(Path(path).expanduser()))
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def file_system(folder: Path, mounts: Path = MOUNTS) -> str:
    """Return the kind of file system that a folder is on, `ext4`; empty where that cannot be found out."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    real, best, kind = Path(os.path.realpath(folder)), -1, ""
    for line in lines:
        before, _, after = line.partition(" - ")
        mount = Path(_unescape(before.split()[4]))
        if real.is_relative_to(mount) and len(mount.parts) >= best:  # the last one mounted hides those before it
            best, kind = len(mount.parts), after.split()[0]
    return kind


def free_bytes(folder: Path) -> tuple[int, int]:
    """Return how many bytes this user may still write on the folder's disk, and the disk's size."""
    found = os.statvfs(folder)
    return found.f_frsize * found.f_bavail, found.f_frsize * found.f_blocks


def probe(folder: Path) -> None:
    """Publish a small file as a job does: write, flush to the disk, rename over another, flush the folder; then remove
    it.

    Raises OSError where that fails, or where what is read back is not what was written.
    """
    name = f".moray-doctor-{uuid.uuid4().hex}"
    partial, final = folder / f"{name}.part", folder / name
    try:
        final.write_bytes(b"old")
        with final.open("rb") as reader:
            with partial.open("wb") as file:
                file.write(b"new" * 1000)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(final)
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if reader.read() != b"old" or final.read_bytes() != b"new" * 1000:
                raise OSError("a file that was renamed over another is not whole; its rename is not atomic")
    finally:
        for path in (partial, final):
            path.unlink(missing_ok=True)


def _unescape(text: str) -> str:
    """Decode a path of mountinfo, where a space is \\040."""
    return text.encode().decode("unicode_escape").encode("latin-1").decode(errors="replace")
