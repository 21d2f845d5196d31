"""The openai package's flow of batches, unchanged, against the routes, with a coordinator beside them."""

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from batch_files import chat_line, jsonl, wait_until
from http_calls import MODEL, call
from openai.types import Batch, FileObject
from patience import PATIENCE_S
from served import Served, served
from test_openai_types import check

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An endpoint with a store and three keys, of which two have one name."""
    folder = tmp_path_factory.mktemp("batches")
    keys = folder / "keys.txt"
    keys.write_text("first team\nsecond  team # replaces the first\nother\n")
    args = {"max_batch_requests": 40, "max_file_bytes": 200_000, "max_num_seqs": 16}
    with served(batch_store=str(folder / "store"), keys_file=str(keys), **args) as endpoint:
        yield endpoint


def client_of(endpoint: Served, key: str = "first") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)


@pytest.fixture
def client(keyed: Served) -> Iterator[openai.OpenAI]:
    with client_of(keyed) as client:
        yield client


def upload(client: openai.OpenAI, content: bytes, name: str = "in.jsonl", **fields: Any) -> FileObject:
    return client.files.create(file=(name, content), purpose="batch", **fields)


def run(client: openai.OpenAI, content: bytes, **fields: Any) -> Batch:
    """Return the batch of this content in its final state."""
    file = upload(client, content)
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", **fields)
    assert batch.status == "validating" and batch.request_counts is not None and batch.request_counts.total == 0
    return wait_until(client, batch.id)


def lines_of(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    values = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    found = {value["custom_id"]: value for value in values}
    assert len(found) == len(values), "a custom_id occurs twice"
    return found


def test_the_whole_flow(client: openai.OpenAI, keyed: Served) -> None:
    lines = [chat_line(number, f"Add {number} and 16.") for number in range(40, 60)]
    lines.append(chat_line(99, "Add 1 and 2.", tools=[{"type": "function"}]))
    lines.append(chat_line(98, "Add 1 and 2.", max_tokens=5_000_000))
    batch = run(client, b"\xef\xbb\xbf\n" + jsonl(lines), metadata={"team": "a"})
    check(Batch, batch.to_dict())
    assert (batch.status, batch.metadata, batch.model, batch.errors) == ("completed", {"team": "a"}, MODEL, None)
    assert batch.request_counts is not None and batch.usage is not None
    assert batch.request_counts.to_dict() == {"total": 22, "completed": 20, "failed": 2}
    answered, refused = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    assert answered.keys() == {f"request-{number}" for number in range(40, 60)}
    assert answered["request-50"]["response"]["body"]["choices"][0]["message"]["content"] == "66"
    assert batch.usage.output_tokens == sum(
        value["response"]["body"]["usage"]["completion_tokens"] for value in answered.values()
    )
    for value in (*answered.values(), *refused.values()):
        assert value.keys() == {"id", "custom_id", "response", "error"} and value["error"] is None
        assert value["id"].startswith("batch_req_") and value["response"]["request_id"].startswith("req_")
    # A refused line has the body of the live answer.
    for custom_id, line in (("request-99", lines[-2]), ("request-98", lines[-1])):
        live = call(keyed.url + CHAT, json.loads(json.dumps(line["body"])), {"Authorization": "Bearer first"})
        response = refused[custom_id]["response"]
        assert (response["status_code"], response["body"]) == (live.status, live.json) and live.status == 400
    again = client.batches.retrieve(batch.id)
    with pytest.raises(openai.ConflictError, match="the batch is completed"):
        client.batches.cancel(again.id)
    assert batch.output_file_id is not None
    file = client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert file.bytes == len(client.files.content(file.id).content)


@pytest.mark.parametrize("fields", [{"temperature": 0, "logprobs": True}, {"temperature": 2, "seed": 4, "n": 2}])
def test_a_line_is_answered_as_the_live_request(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    batch = run(client, jsonl([chat_line(1, "Add 86 and 16.", **fields)]))
    body = lines_of(client, batch.output_file_id)["request-1"]["response"]["body"]
    live = client.chat.completions.create(**chat_line(1, "Add 86 and 16.", **fields)["body"]).to_dict()
    names = body.keys() - {"id", "created"}
    assert {name: body[name] for name in names} == {name: live[name] for name in names}


def test_all_lines_refused(client: openai.OpenAI) -> None:
    batch = run(client, jsonl([chat_line(1, "Hello", temperature="hot")]))
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert lines_of(client, batch.error_file_id)["request-1"]["response"]["body"]["error"]["param"] == "temperature"


def test_a_wrong_file_runs_nothing(client: openai.OpenAI) -> None:
    good = chat_line(1, "Add 1 and 2.")
    batch = run(client, jsonl([good, good]) + b"{\n\n" + jsonl([{**good, "custom_id": "x", "url": "/v1/embeddings"}]))
    assert batch.status == "failed" and batch.output_file_id is batch.error_file_id is None
    assert batch.errors is not None and batch.errors.data is not None
    found = [(error.code, error.line, error.param) for error in batch.errors.data]
    expected = [("duplicate_custom_id", 2, "custom_id"), ("invalid_json_line", 3, None), ("invalid_url", 5, "url")]
    assert found == expected


def test_files_and_their_pages(keyed: Served) -> None:
    with client_of(keyed, "other") as client:
        made = [upload(client, b"%d" % number, f"{number}.jsonl") for number in range(5)]
        check(FileObject, made[0].to_dict())
        ids = [file.id for file in made]
        assert [file.id for file in client.files.list()] == ids[::-1]  # newest first, though made in one second
        assert [file.id for file in client.files.list(limit=2)] == ids[::-1]  # the package reads page after page
        page = client.files.list(limit=2, order="asc", after=ids[0])
        assert [file.id for file in page.data] == ids[1:3] and page.has_more
        assert not client.files.list(limit=2, order="asc", after=ids[2]).has_more
        assert client.files.list(purpose="batch_output").data == []
        assert client.files.delete(ids[0]).deleted
        for ask in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError, match=f"No such File object: {ids[0]}"):
                ask(ids[0])
        short = upload(client, b"x", expires_after={"anchor": "created_at", "seconds": 3600})
        assert short.expires_at == short.created_at + 3600
        assert made[0].expires_at == made[0].created_at + 30 * 24 * 3600


def test_others_have_nothing(keyed: Served) -> None:
    with client_of(keyed, "first") as mine, client_of(keyed, "second") as team, client_of(keyed, "other") as other:
        file = upload(mine, jsonl([chat_line(1, "Add 1 and 2.")]))
        batch = mine.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert team.files.retrieve(file.id) == file and team.batches.retrieve(batch.id).id == batch.id
        for ask in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="No such Batch object"):
                ask(batch.id)
        for ask in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                ask(file.id)
        with pytest.raises(openai.NotFoundError, match="input_file_id: there is no file"):
            other.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert file.id not in [one.id for one in other.files.list()]
        assert [one.id for one in other.batches.list()] == []
        assert batch.id in [one.id for one in team.batches.list(limit=1)]
        wait_until(mine, batch.id)


def test_a_deleted_file_does_not_end_its_batch(client: openai.OpenAI) -> None:
    file = upload(client, jsonl([chat_line(1, "Add 1 and 2.")]))
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="2d")
    client.files.delete(file.id)
    done = wait_until(client, batch.id)
    assert done.status == "completed" and done.expires_at == done.created_at + 2 * 24 * 3600


def test_cancel(client: openai.OpenAI, keyed: Served) -> None:
    lines = [chat_line(number, "Hello", max_tokens=120, ignore_eos=True) for number in range(40)]
    file = upload(client, jsonl(lines))
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    wait_until(client, batch.id, lambda one: one.status == "in_progress")
    metrics = call(f"{keyed.url}/metrics", headers={"Authorization": "Bearer first"}).text
    assert 'moray_batches{state="in_progress"} 1.0' in metrics and "moray_batch_requests_pending 40.0" in metrics
    assert client.batches.cancel(batch.id).status == "cancelling"
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    done = wait_until(client, batch.id)
    assert done.status == "cancelled" and done.cancelling_at is not None and done.cancelled_at is not None
    counts = done.request_counts
    assert counts is not None and counts.completed + counts.failed == counts.total == 40
    not_run = lines_of(client, done.error_file_id)
    answered = {} if done.output_file_id is None else lines_of(client, done.output_file_id)
    assert len(not_run) + len(answered) == 40 and len(answered) == counts.completed
    codes = {(value["response"], value["error"]["code"]) for value in not_run.values()}
    assert codes == {(None, "batch_cancelled")}


def test_what_is_refused(client: openai.OpenAI, keyed: Served) -> None:
    auth = {"Authorization": "Bearer first"}
    with pytest.raises(openai.APIStatusError, match="the file is larger than 200,000 bytes") as large:
        upload(client, b"x" * 201_000)
    assert (large.value.status_code, large.value.code) == (413, "file_too_large")
    with pytest.raises(openai.APIStatusError, match="the body is larger than") as large:
        upload(client, b"x" * 4_000_000)
    assert large.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="purpose: must be batch"):
        client.files.create(file=("a", b"x"), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match=r"expires_after\[seconds\]: must be a whole number from 3600"):
        upload(client, b"x", expires_after={"anchor": "created_at", "seconds": 10})
    for body, code in ((b"{}", "invalid_multipart"), (b"--x\r\n", "invalid_multipart")):
        kind = "multipart/form-data; boundary=x" if body != b"{}" else "application/json"
        reply = call(f"{keyed.url}/v1/files", body, auth | {"Content-Type": kind})
        assert (reply.status, reply.error["code"]) == (400, code)
    assert call(f"{keyed.url}/v1/files", b"x" * 100_000, {"Authorization": "Bearer no"}).status == 401
    file = upload(client, jsonl([chat_line(number, "Hello") for number in range(41)]))
    for fields, param in (
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "24"}, "completion_window"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
        ({"extra_body": {"priority": 1}}, "priority"),
    ):
        with pytest.raises(openai.BadRequestError) as wrong:
            client.batches.create(
                **({"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | fields)  # type: ignore[arg-type]
            )
        assert wrong.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("../../x")
    made = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    errors = wait_until(client, made.id).errors
    assert errors is not None and errors.data is not None and errors.data[0].code == "too_many_tasks"
    assert list(client.files.list(limit=1, after="file-0")) == []


def test_nothing_but_the_owner_reads_the_store(keyed: Served, client: openai.OpenAI) -> None:
    batch = run(client, jsonl([chat_line(1, "Add 1 and 2.")]))
    root = Path(str(keyed.endpoint.args.batch_store))
    modes = {path.stat().st_mode & 0o777 for path in root.iterdir()}
    assert modes == {0o700}
    files = [path for path in root.rglob("*") if path.is_file() and "events" not in path.parts]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert any(path.suffix == ".parquet" for path in (root / "jobs" / batch.id).iterdir())
    assert not (root / "jobs" / batch.id / "input.jsonl").exists() and list((root / "open").iterdir()) == []


def test_without_a_store(local: Served) -> None:
    for path in ("/v1/files", "/v1/batches"):
        reply = call(local.url + path)
        assert (reply.status, reply.error["code"]) == (501, "batches_not_offered")


def test_an_upload_that_breaks_off_leaves_nothing(keyed: Served) -> None:
    folder = Path(str(keyed.endpoint.args.batch_store)) / "files"
    before = set(folder.rglob("*"))
    host, port = keyed.url.removeprefix("http://").split(":")
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer first\r\nContent-Length: 100000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nbegun'
    )

    def wait(is_reached: Callable[[], bool]) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not is_reached():
            assert time.monotonic() < end_s
            time.sleep(0.01)

    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode())
        wait(lambda: set(folder.rglob("*")) > before)
    wait(lambda: set(folder.rglob("*")) == before)
    assert call(f"{keyed.url}/v1/models", headers={"Authorization": "Bearer first"}).status == 200


def test_a_body_without_a_length_is_counted(keyed: Served) -> None:
    """It is sent in chunks, so its size shows only while it arrives."""

    def content() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield from (b"x" * 10_000 for _ in range(25))

    connection = http.client.HTTPConnection(keyed.url.removeprefix("http://"), timeout=PATIENCE_S)
    headers = {
        "Authorization": "Bearer first",
        "Content-Type": "multipart/form-data; boundary=x",
        "Transfer-Encoding": "chunked",
    }
    connection.request("POST", "/v1/files", content(), headers, encode_chunked=True)
    with closing(connection), connection.getresponse() as reply:
        assert reply.status == 413
