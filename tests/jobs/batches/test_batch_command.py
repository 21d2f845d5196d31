"""`moray batch` as a process of its own: interrupted, killed, and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from batch_files import chat_line, jsonl
from patience import PATIENCE_S

from moray.batch.output.verify import verify
from moray.engine.errors import InputError, OutputError, SettingsError
from moray.jobs.commands.batch import run_batch
from moray.jobs.commands.serve import read_args
from moray.serve.args import EndpointArgs

MORAY = Path(sys.executable).with_name("moray")
SETTINGS = ["max_num_seqs=8", "num_threads=1"]


def args(*overrides: str, model: Path | str = "") -> EndpointArgs:
    return read_args(str(model or EXAMPLE), "float32", [*SETTINGS, *overrides])


EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-phimoe"


def write(folder: Path, lines: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Write the input file; return its path and that of the output."""
    (folder / "in.jsonl").write_bytes(jsonl(lines))
    return str(folder / "in.jsonl"), str(folder / "out.jsonl")


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_file_is_answered_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [chat_line(number, f"Add {number} and 16.") for number in range(40, 60)]
    lines.append(chat_line(7, "?", temperature=-1))
    completion = {"model": "tiny-phimoe", "prompt": "The sum of 86 and 16 is", "temperature": 0}
    lines.append({"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": completion})
    source, output = write(tmp_path, lines)
    assert run_batch(args(), source, output) == 0
    answers = read(output)
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in lines]
    assert answers[10]["response"]["body"]["choices"][0]["message"]["content"] == "66"
    assert answers[-1]["response"]["body"]["choices"][0]["text"] == " 102"
    assert answers[-2]["response"]["body"]["error"]["param"] == "temperature"
    found = verify(output + ".parts")
    assert found.closes and (found.ok, found.errors) == (21, {"invalid_parameter": 1})
    printed = capsys.readouterr().out
    assert "in.jsonl SUCCEEDED" in printed and "21 of 22 rows ok" in printed and "starting Ray" not in printed
    before = Path(output).read_bytes()
    assert run_batch(args(), source, output) == 0
    assert "all 22 requests are answered already" in capsys.readouterr().out
    assert Path(output).read_bytes() == before
    with pytest.raises(OutputError, match=r"model.name: .*tiny-phimoe.* -> .*other"):
        lines = [line | {"body": line["body"] | {"model": "other"}} for line in lines]
        run_batch(args("name=other"), write(tmp_path, lines)[0], output)


def test_what_is_wrong_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    source, output = write(tmp_path, [chat_line(1, "a"), chat_line(1, "b"), chat_line(2, "c") | {"url": "/v1/x"}])
    with pytest.raises(InputError) as wrong:
        run_batch(args(), source, output)
    first, second = str(wrong.value).splitlines()
    assert first == f"{source} line 2: The custom_id 'request-1' is that of line 1 too."
    assert second.startswith(f"{source} line 3: The URL provided")
    with pytest.raises(InputError, match=r"nowhere.jsonl cannot be read"):
        run_batch(args(), str(tmp_path / "nowhere.jsonl"), output)
    with pytest.raises(SettingsError, match="max_waiting: is a setting of an endpoint"):
        run_batch(args("max_waiting=3"), source, output)
    assert not Path(output + ".parts").exists()


class Process:
    """The command in a process, with an input of `num_lines` long answers."""

    def __init__(self, folder: Path, num_lines: int) -> None:
        lines = [
            chat_line(number, f"Add {number}.", temperature=1, max_tokens=60, ignore_eos=True)
            for number in range(num_lines)
        ]
        self.source, self.output = write(folder, lines)
        self.lines = lines

    @property
    def parts(self) -> set[str]:
        return {path.name for path in Path(self.output + ".parts").glob("*.parquet")}

    def start(self) -> "subprocess.Popen[str]":
        options = [option for setting in SETTINGS for option in ("--set", setting)]
        command = [MORAY, "batch", self.source, "-o", self.output, "--dtype", "float32", *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def start_until(self, num_parts: int) -> "subprocess.Popen[str]":
        process, end_s = self.start(), time.monotonic() + PATIENCE_S
        while len(self.parts) < num_parts:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end_s
            time.sleep(0.02)
        return process


@pytest.mark.slow
@pytest.mark.alone
def test_ctrl_c_and_kill_and_on(tmp_path: Path) -> None:
    process = Process(tmp_path, 120)
    running = process.start_until(2)
    running.send_signal(signal.SIGINT)
    printed, _ = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 128 + signal.SIGINT, printed
    assert "Run the same command again to continue" in printed and not os.path.exists(process.output)
    first = process.parts
    assert 2 <= len(first) < 15
    running = process.start_until(len(first) + 3)
    running.kill()
    running.communicate()
    second = process.parts
    assert first < second
    times = {name: os.stat(f"{process.output}.parts/{name}").st_mtime_ns for name in second}
    running = process.start()
    printed, _ = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, printed
    assert times == {name: os.stat(f"{process.output}.parts/{name}").st_mtime_ns for name in second}
    assert [answer["custom_id"] for answer in read(process.output)] == [line["custom_id"] for line in process.lines]
    assert verify(process.output + ".parts").closes
