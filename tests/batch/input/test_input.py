import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from moray.batch.input import InputFiles, columns, read_input
from moray.batch.input.column_types import normalise
from moray.batch.input.columns import find_gaps, unify_kept
from moray.batch.input.input_file import InputFile
from moray.batch.input.listing import list_files
from moray.batch.input.reader import ShardReader
from moray.batch.shards import Slice
from moray.batch.spec import JobSpec
from moray.engine.errors import InputError, SpecError, UserError

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]))


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, columns: dict[str, Any] | pa.Table | None = None, **options: Any) -> None:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns or {"prompt": ["a", "b"]})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)


def read(path: Any = "in", **sections: Any) -> InputFiles:
    required: dict[str, Any] = {"model": {"path": "m"}, "input": {"path": path}, "output": {"path": "out"}}
    merged = {name: required.get(name, {}) | value for name, value in sections.items()}
    return read_input(JobSpec.model_validate(required | merged))


def paths(path: Any) -> list[str]:
    return [file.path for file in read(path).files]


def refusal(path: Any = "in", kind: type[UserError] = InputError, **sections: Any) -> str:
    with pytest.raises(UserError) as error:
        read(path, **sections)
    assert type(error.value) is kind
    return str(error.value)


@pytest.fixture
def tree() -> None:
    for name in (
        "b.parquet",
        "a/1.PARQ",
        "a/x=1/2.parquet",
        "c.d/3.parquet",
        "[e]/4.parquet",
        "spark.parquet/part-0.parquet",
    ):
        write(f"in/{name}")
    for name in ("_SUCCESS", ".b.parquet.crc", "a/_delta/5.parquet", "a/.tmp/6.parquet", "a/_7.parquet", "notes.txt"):
        Path("in", name).parent.mkdir(exist_ok=True)
        Path("in", name).write_text("not Parquet")


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("path", "root", "found"),
    [
        (
            "in",
            "in",
            [
                "[e]/4.parquet",
                "a/1.PARQ",
                "a/x=1/2.parquet",
                "b.parquet",
                "c.d/3.parquet",
                "spark.parquet/part-0.parquet",
            ],
        ),
        ("in/a/", "in/a", ["1.PARQ", "x=1/2.parquet"]),
        ("in/b.parquet", "in", ["b.parquet"]),
        ("in/*.parquet", "in", ["b.parquet", "spark.parquet/part-0.parquet"]),
        ("in/*/*.parquet", "in", ["[e]/4.parquet", "c.d/3.parquet", "spark.parquet/part-0.parquet"]),
        ("in/**/[0-9].parquet", "in", ["[e]/4.parquet", "a/x=1/2.parquet", "c.d/3.parquet"]),
        ("in/a/**", "in/a", ["1.PARQ", "x=1/2.parquet"]),
        ("in/a/x=?", "in/a", ["x=1/2.parquet"]),
        ("in/[e]", "in/[e]", ["4.parquet"]),
        ("in/a/_delta/*", None, None),
        (["in/a", "in/b.parquet", "in/a/1.PARQ"], "in", ["a/1.PARQ", "a/x=1/2.parquet", "b.parquet"]),
        (["in/b.parquet", "in/c.d/*"], "in", ["b.parquet", "c.d/3.parquet"]),
    ],
)
def test_paths(path: Any, root: str | None, found: list[str] | None) -> None:
    if root is None:
        assert refusal(path).startswith("5.parquet: is not a Parquet file, or cut short: ends in b'quet'")
        return
    files = read(path, input={"hive": False})
    assert files.root == str(Path(root).absolute())
    assert [file.path for file in files.files] == found


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "nothing: no such file or folder"),
        ("in", "in: the folder holds no files named *.parquet, *.parq, *.pq, *.jsonl or *.ndjson; there is notes.txt"),
        (
            "in/*.txt",
            "in/*.txt: matches no files named *.parquet, *.parq, *.pq, *.jsonl or *.ndjson; there is notes.txt",
        ),
        ("no/*/x.parquet", "no/*/x.parquet: matches no files named *.parquet, *.parq, *.pq, *.jsonl or *.ndjson"),
        (["in/notes.txt", "gone"], "gone: no such file or folder"),
    ],
)
def test_paths_that_name_nothing(path: Any, message: str) -> None:
    Path("in").mkdir()
    Path("in/notes.txt").write_text("x")
    assert refusal(path) == message


def test_an_address_of_another_kind() -> None:
    message = refusal("http://a/b", kind=UserError)
    assert message == "http://a/b: must be a local path or start with s3://, gs://, file://"
    message = refusal("hf://a/b")
    assert message == "hf://a/b: must be hf://datasets/org/name, with a folder, file or glob after it"


def test_what_a_footer_tells() -> None:
    write("in/a.parquet", {"prompt": ["x"] * 10}, row_group_size=4)
    write("in/wide.parquet", {f"c{i}": ["x"] for i in range(2000)} | {"prompt": ["y"]})
    small, wide = read(output={"keep": "none"}).files
    content = Path("in/a.parquet").read_bytes()
    length = int.from_bytes(content[-8:-4], "little") + 8
    assert small.size == len(content)
    assert (small.num_rows, small.row_group_rows) == (10, (4, 4, 2))
    assert small.identity == f"{small.size} bytes, footer {hashlib.sha256(content[-length:]).hexdigest()}"
    assert wide.num_rows == 1
    assert Path("in/wide.parquet").stat().st_size > 64 * 1024


def test_every_bad_file_is_named() -> None:
    write("in/good.parquet")
    content = Path("in/good.parquet").read_bytes()
    Path("in/cut.parquet").write_bytes(content[:-20])
    Path("in/empty.parquet").write_bytes(b"")
    Path("in/garbage.parquet").write_bytes(b"PAR1" + b"\xff" * 40 + (40).to_bytes(4, "little") + b"PAR1")
    Path("in/long.parquet").write_bytes(b"PAR1" + (5000).to_bytes(4, "little") + b"PAR1")
    cut, empty, garbage, long = refusal().split("\n")
    assert cut.startswith("cut.parquet: is not a Parquet file, or cut short: ends in b'")
    assert empty == "empty.parquet: is not a Parquet file, or cut short: is empty"
    assert garbage.startswith("garbage.parquet: has a footer that cannot be read: ")
    assert long == "long.parquet: is cut short: its footer takes 5,008 bytes, the file has 12"


def test_many_bad_files_are_counted() -> None:
    for i in range(25):
        write(f"in/{i:02}.parquet", {"x": [1]})
    lines = refusal().split("\n")
    assert lines[0] == "00.parquet: has no column 'prompt' (input.prompt); known: x"
    assert len(lines) == 21
    assert lines[-1] == "... and 5 more"


def test_zero_rows() -> None:
    write("in/a.parquet", {"prompt": pa.array([], pa.string())})
    assert read().num_rows == 0


@pytest.mark.parametrize(
    ("kind", "good"),
    [
        (
            "prompt",
            [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), pa.string_view(), pa.null()],
        ),
        (
            "messages",
            [
                MESSAGES,
                pa.large_list(MESSAGES.value_type),
                pa.list_(pa.struct([*MESSAGES.value_type, ("name", pa.string())])),
            ],
        ),
        ("token_ids", [pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 3)]),
    ],
)
def test_columns_of_the_right_type(kind: str, good: list[pa.DataType]) -> None:
    for type_ in good:
        write("in/a.parquet", pa.table({"x": pa.nulls(2, type_)}))
        assert read(input={kind: "x"}).read_columns == ("x",)


@pytest.mark.parametrize(
    ("kind", "allowed", "bad"),
    [
        ("prompt", "text", [pa.int64(), pa.binary(), pa.list_(pa.string())]),
        (
            "messages",
            "a list of structs or maps with the texts role and content, or such a list as JSON text",
            [pa.int64(), pa.list_(pa.string()), pa.list_(pa.struct([("role", pa.string())])), MESSAGES.value_type],
        ),
        ("token_ids", "a list of whole numbers", [pa.string(), pa.list_(pa.float32()), pa.int64()]),
    ],
)
def test_columns_of_a_wrong_type(kind: str, allowed: str, bad: list[pa.DataType]) -> None:
    for type_ in bad:
        write("in/a.parquet", pa.table({"x": pa.nulls(2, type_)}))
        found = pq.read_schema("in/a.parquet").field("x").type
        assert refusal(input={kind: "x"}) == f"a.parquet: column 'x' (input.{kind}) must be {allowed}, is {found}"


def test_columns_that_the_spec_names() -> None:
    write("in/a.parquet", {"promt": ["x"], "id": [1], "t": ["hot"], "stop": [["x"]], "bias": [[5]]})
    assert refusal(
        sampling={"columns": {"temperature": "t", "stop": "stop", "logit_bias": "bias", "seed": "seeed"}},
        output={"keep": ["idd"]},
    ).split("\n") == [
        "a.parquet: has no column 'prompt' (input.prompt); did you mean 'promt'?",
        "a.parquet: column 't' (sampling.columns.temperature) must be a number, is string",
        "a.parquet: column 'bias' (sampling.columns.logit_bias) must be a map from whole numbers to numbers, "
        "is list<element: int64>",
        "a.parquet: has no column 'seeed' (sampling.columns.seed); known: promt, id, t, stop, bias",
        "a.parquet: has no column 'idd' (output.keep); did you mean 'id'?",
    ]


def test_a_template_reads_its_columns_instead_of_the_prompt() -> None:
    write("in/a.parquet", {"question": ["x"], "id": [1], "tags": [["x"]]})
    files = read(template={"prompt": "{id}: {question}"}, output={"keep": "none"})
    assert files.read_columns == ("id", "question")
    assert refusal(template={"prompt": "{tags}"}) == (
        "a.parquet: column 'tags' (template.prompt) must be text or a number, is list<element: string>"
    )


def test_one_schema_for_all_parts() -> None:
    texts = ["x", None]
    write("in/1.parquet", pa.table({"prompt": pa.array(texts).dictionary_encode(), "id": [1, 2], "note": pa.nulls(2)}))
    write("in/2.parquet", pa.table({"note": pa.array(texts, pa.large_string()), "id": [1, 2], "prompt": texts}))
    write(
        "in/3.parquet", pa.table({"prompt": pa.nulls(2), "note": pa.array(texts, pa.string_view()), "id": pa.nulls(2)})
    )
    files = read(output={"token_ids": True, "logprobs": 2})
    pair = pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())])
    assert files.kept_columns == ("prompt", "id", "note")
    assert files.output_schema == pa.schema(
        [
            ("prompt", pa.string()),
            ("id", pa.int64()),
            ("note", pa.string()),
            ("sample", pa.int32()),
            ("generated_text", pa.string()),
            ("finish_reason", pa.string()),
            ("num_prompt_tokens", pa.int32()),
            ("num_generated_tokens", pa.int32()),
            ("generated_token_ids", pa.list_(pa.int32())),
            ("logprobs", pa.list_(pa.struct([*pair, ("top", pa.list_(pair))]))),
            ("error", pa.struct([("stage", pa.string()), ("code", pa.string()), ("message", pa.string())])),
            ("source_file", pa.string()),
            ("source_row", pa.int64()),
        ]
    )
    assert "logprobs" not in read().output_schema.names
    assert "generated_token_ids" not in read().output_schema.names


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (pa.list_(pa.dictionary(pa.int32(), pa.large_string())), pa.list_(pa.string())),
        (pa.large_list(pa.struct([("a", pa.large_binary())])), pa.list_(pa.struct([("a", pa.binary())]))),
        (pa.map_(pa.large_string(), pa.string_view()), pa.map_(pa.string(), pa.string())),
        (pa.list_(pa.large_string(), 2), pa.list_(pa.string(), 2)),
        (pa.timestamp("us", "UTC"), pa.timestamp("us", "UTC")),
    ],
)
def test_kept_types_at_every_depth(given: pa.DataType, plain: pa.DataType) -> None:
    write("in/a.parquet", pa.table({"prompt": ["x"], "x": pa.nulls(1, given)}))
    assert read().output_schema.field("x").type == plain


def test_files_that_differ_in_kept_columns() -> None:
    write("in/1.parquet", {"prompt": ["a"], "id": [1], "tag": ["x"]})
    write("in/2.parquet", {"prompt": ["a"], "id": ["1.5"]})
    assert refusal().split("\n") == [
        "2.parquet: column 'id' is string, but int64 in 1.parquet; name the columns to keep in output.keep",
    ]
    assert read(output={"keep": ["prompt"]}).kept_columns == ("prompt",)
    assert read(output={"keep": "none"}).read_columns == ("prompt",)


def test_extension_types_that_differ_though_they_are_stored_alike() -> None:
    """Read as the first file's, days since 1970 would be months."""

    def periods(freq: str) -> pa.Table:
        extension = {
            "ARROW:extension:name": "pandas.period",
            "ARROW:extension:metadata": json.dumps({"freq": freq}),
        }
        fields = [pa.field("prompt", pa.string()), pa.field("when", pa.int64(), metadata=extension)]
        return pa.table([["a"], [600]], schema=pa.schema(fields))

    write("in/1.parquet", periods("M"))
    write("in/2.parquet", periods("M"))
    assert read().output_schema.field("when").metadata[b"ARROW:extension:metadata"] == b'{"freq": "M"}'
    write("in/2.parquet", periods("D"))
    write("in/3.parquet", {"prompt": ["a"], "when": [600]})
    write("in/4.parquet", {"prompt": ["a"], "when": pa.nulls(1)})
    months = 'pandas.period {"freq": "M"} (int64) in 1.parquet; name the columns to keep in output.keep'
    assert refusal().split("\n") == [
        f'2.parquet: column \'when\' is pandas.period {{"freq": "D"}} (int64), but {months}',
        f"3.parquet: column 'when' is int64, but {months}",
    ]


def test_a_column_that_some_files_lack_is_kept_and_said() -> None:
    """With keep: all whichever comes first; a column that is kept by name must be everywhere."""
    write("in/1.parquet", {"prompt": ["a"], "tag": ["x"]})
    write("in/2.parquet", {"score": [0.5], "prompt": ["a"]})
    write("in/3.parquet", {"prompt": ["b"], "score": pa.nulls(1)})
    files = read()
    assert files.kept_columns == ("prompt", "tag", "score")
    assert files.output_schema.field("score").type == pa.float64()
    assert files.warnings == (
        "column 'tag' is in 1 of 3 files, the first 1.parquet; it is null in the rows of the other files",
        "column 'score' is in 2 of 3 files, the first 2.parquet; it is null in the rows of the other files",
    )
    reader = ShardReader(files.filesystem, files.root, files.read_columns, files.output_schema)
    assert reader.read(Slice("1.parquet", 0, 1)).to_pylist() == [{"prompt": "a", "tag": "x", "score": None}]
    assert reader.read(Slice("2.parquet", 0, 1)).to_pylist() == [{"prompt": "a", "tag": None, "score": 0.5}]
    assert reader.read(Slice("3.parquet", 0, 1)).to_pylist() == [{"prompt": "b", "tag": None, "score": None}]
    assert read(output={"keep": ["prompt"]}).warnings == ()
    assert refusal(output={"keep": ["tag"]}).startswith("2.parquet: has no column 'tag' (output.keep)")


def test_parquet_files_of_other_names() -> None:
    for name in ("a.parquet", "b.pq", "c.parquet.snappy", "d.PARQUET", "e.parq.gz"):
        write(f"in/{name}")
    assert paths("in") == paths("in/*") == ["a.parquet", "b.pq", "c.parquet.snappy", "d.PARQUET", "e.parq.gz"]
    assert read().warnings == ()


def test_files_that_are_left_out_are_named() -> None:
    write("in/a.parquet")
    write("in/sub/20240701_00037_abcde")
    for name in ("notes.txt", "_SUCCESS", ".a.parquet.crc", "_delta/x.json"):
        Path("in", name).parent.mkdir(exist_ok=True)
        Path("in", name).write_text("x")
    said = (
        "2 files left out, not named *.parquet, *.parq, *.pq, *.jsonl or *.ndjson: notes.txt, sub/20240701_00037_abcde",
        "Parquet all the same is sub/20240701_00037_abcde; rename it or name it in input.path to have it read",
    )
    assert read().warnings == read("in/**").warnings == said
    assert read("in/*.parquet").warnings == ()
    assert read(["in", "in/sub/20240701_00037_abcde"]).warnings == (
        "1 file left out, not named *.parquet, *.parq, *.pq, *.jsonl or *.ndjson: notes.txt",
    )
    for number in range(7):
        Path(f"in/{number}.csv").write_text("x")
    assert read().warnings[0].endswith(": 0.csv, 1.csv, 2.csv, 3.csv, 4.csv and 4 more")


def test_links() -> None:
    write("real/sub/x.parquet")
    Path("in").mkdir()
    Path("in/dir").symlink_to("../real/sub")
    Path("in/file.parquet").symlink_to("../real/sub/x.parquet")
    Path("in/_old").symlink_to("nowhere")
    assert paths("in") == ["dir/x.parquet", "file.parquet"]
    Path("in/again").symlink_to(".")
    for path in ("in", "in/**", "in/*"):
        target = f"is a link to {Path('in').resolve()}, which holds it; remove it, or name other folders"
        assert refusal(path).endswith(f"in/again: {target}")
    Path("in/again").unlink()
    Path("real/sub/back").symlink_to("../../in")
    target = f"is a link to {Path('in').resolve()}, which holds it; remove it, or name other folders"
    assert refusal("in").endswith(f"in/dir/back: {target}"), "it is in another folder, by the link that led there"
    Path("real/sub/back").unlink()
    Path("in/gone.parquet").symlink_to("../nowhere.parquet")
    assert refusal().endswith("in/gone.parquet: is a link to ../nowhere.parquet, which does not exist; remove it")


def test_files_alike_are_compared_without_a_look_at_each_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type is taken apart once a column, not once a file: there may be ten thousand."""
    kinds = pa.schema([("prompt", pa.string()), *((f"c{i}", pa.int64()) for i in range(50))])
    files = [InputFile(f"{i:05}.parquet", 9, 1, (1,), "x", kinds) for i in range(1_000)]
    spec = JobSpec.model_validate({"model": {"path": "m"}, "input": {"path": "in"}, "output": {"path": "out"}})
    taken = []

    def note(kind: pa.DataType) -> pa.DataType:
        taken.append(kind)
        return normalise(kind)

    monkeypatch.setattr(columns, "normalise", note)
    assert len(unify_kept(spec, files)) == 51 and not list(find_gaps(spec, files))
    assert len(taken) == 51


def test_a_kept_column_with_a_reserved_name() -> None:
    write("in/1.parquet", {"prompt": ["a"], "id": [1], "logprobs": [1]})
    message = "output.keep: the job writes a column 'logprobs' of its own; keep others: [prompt, id]"
    assert refusal(kind=SpecError) == message
    assert read(output={"keep": ["id"]}).read_columns == ("id", "prompt")


def test_two_columns_of_one_name() -> None:
    write("in/1.parquet", pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]))
    assert refusal() == "1.parquet: has two columns named 'prompt'"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("in", "output.path: holds the input file 1.parquet; write to a folder of its own"),
        (".", "output.path: holds the input file 1.parquet; write to a folder of its own"),
        ("in/out", "output.path: is inside the input folder {}/in; write to a folder outside it"),
    ],
)
def test_output_among_the_input(output: str, message: str, tmp_path: Path) -> None:
    write("in/1.parquet")
    assert refusal(kind=SpecError, output={"path": output}) == message.format(tmp_path)


@pytest.mark.parametrize(
    ("glob", "output"),
    [
        ("in/*", "in/out"),
        ("in/*", "in/sub/out"),
        ("in/*", "in/sub.parquet"),
        ("in/**", "in/out"),
        ("in/**/*.parquet", "in/out/x"),
        ("i*/**/p*", "in/out"),
        ("in/_*/*", "in/_out"),
        (["in/1.parquet", "in/*/*"], "in/out"),
    ],
)
def test_output_that_a_glob_would_find(glob: Any, output: str) -> None:
    """Refused by the first run; and what is refused would be found."""
    for name in ("1.parquet", "sub/p.parquet", "_out_of_use/2.parquet"):
        write(f"in/{name}")
    before = len(list_files((glob,) if isinstance(glob, str) else glob).files)
    pattern = glob if isinstance(glob, str) else glob[-1]
    message = f"its parts would be input too, of {Path.cwd()}/{pattern}; write to a folder that it does not match"
    assert refusal(glob, kind=SpecError, output={"path": output}) == f"output.path: {message}"
    write(f"{output}/part-0a1b2c3d-000000.parquet")
    assert len(list_files((glob,) if isinstance(glob, str) else glob).files) == before + 1


@pytest.mark.parametrize(
    ("glob", "output"),
    [
        ("in/*", "in2/out"),
        ("in/*", "in/_out"),
        ("in/*.parquet", "in/out"),
        ("in/*/1*", "in/out"),
        ("in/*/*", "in/.cache/out"),
        ("in/**/[0-9].parquet", "in/out"),
        ("in/?/*", "in/out"),
        ("in/1.parquet", "in/out"),
    ],
)
def test_output_beside_the_input(glob: str, output: str) -> None:
    for name in ("1.parquet", "a/1.parquet"):
        write(f"in/{name}")
    before = read(glob, output={"path": output}).num_rows
    write(f"{output}/part-0a1b2c3d-000000.parquet")
    assert len(list_files((glob,)).files) == before // 2


def test_output_in_a_folder_beside_the_input() -> None:
    write("in/1.parquet")
    assert read(output={"path": "in2"}).num_rows == 2


def test_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        query = f"?endpoint_override={host}:{port}&scheme=http&allow_bucket_creation=true"
        bucket, _ = fs.FileSystem.from_uri(f"s3://prompts{query}")
        bucket.create_dir("prompts")
        for name in ("a/1.parquet", "a/_temporary/2.parquet", "b/3.parquet"):
            with bucket.open_output_stream(f"prompts/in/{name}") as stream:
                pq.write_table(pa.table({"prompt": ["x"]}), stream)
        folder = read(f"s3://prompts/in/{query}")
        assert (folder.root, [file.path for file in folder.files]) == ("prompts/in", ["a/1.parquet", "b/3.parquet"])
        assert pq.read_table(folder.full_path("b/3.parquet"), filesystem=folder.filesystem).num_rows == 1
        assert paths(f"s3://prompts/in/*/3.parquet{query}") == ["b/3.parquet"]
        assert paths(f"s3://prompts/in/b/3.parquet{query}") == ["3.parquet"]
        assert refusal(f"s3://prompts/none{query}") == f"s3://prompts/none{query}: no such file or folder"
    finally:
        server.stop()
