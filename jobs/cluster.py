"""Cluster: the jobs of a Ray cluster, through its dashboard's job API, with errors a person can act on."""

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from engine.errors import JobError, UserError
from jobs.submission import NAME, OUTPUT, Submission, next_id, select

CONNECT_S = 10.0
LOST_S = 60.0  # a cluster that has not answered for so long is gone
POLL_S = 1.0


class Cluster:
    """address: of the dashboard, http://head:8265. Raises UserError where no cluster of our Ray answers there."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        _check(self.address)
        # Ray lets these override what it is given; who names an address means that one.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.ERROR)
        with self._explained():
            self._client = JobSubmissionClient(self.address)

    def submissions(self) -> list[Submission]:
        """Those of moray, the first one first."""
        with self._explained():
            found = self._client.list_jobs()
        ours = [Submission.of(job) for job in found if job.metadata and OUTPUT in job.metadata and job.submission_id]
        return sorted(ours, key=lambda submission: submission.started_s)

    def find(self, target: str) -> Submission:
        """As select."""
        return select(self.submissions(), target, self.address)

    def submit(self, name: str, output: str, entrypoint: str, working_dir: Path, env: Mapping[str, str]) -> Submission:
        """Start a job. Its id is made of name, output folder and a number that grows: Ray takes no id twice.

        Raises UserError where a submission with this output folder is not over.
        """
        output = output.rstrip("/")
        same = [one for one in self.submissions() if one.output == output]
        if running := [one for one in same if not one.is_over]:
            raise UserError(_busy(running[-1].id, output, self.address))
        submission_id = next_id(name, output, [one.id for one in same])
        try:
            with self._explained():
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=submission_id,
                    metadata={NAME: name, OUTPUT: output},
                    runtime_env={"working_dir": str(working_dir), "env_vars": dict(env)},
                )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise JobError(f"{self.address} did not take the job: {error}") from None
            raise UserError(_busy(submission_id, output, self.address)) from None
        return self.get(submission_id)

    def get(self, submission_id: str) -> Submission:
        with self._explained():
            return Submission.of(self._client.get_job_info(submission_id))

    def logs(self, submission_id: str) -> str:
        with self._explained():
            return str(self._client.get_job_logs(submission_id))

    def follow(self, submission_id: str, write: Callable[[str], None]) -> Submission:
        """Write the log as it grows until the job is over. The end of the stream is not taken for the end of the job.

        Raises JobError where the cluster has not answered for LOST_S.
        """
        written, heard_s = 0, time.monotonic()
        while True:
            try:
                now = self.get(submission_id)
                log = self.logs(submission_id) if now.is_over else ""
                heard_s = time.monotonic()
            except UserError:
                if time.monotonic() - heard_s > LOST_S:
                    raise JobError(f"{self.address} does not answer any more; the job may still run there") from None
                time.sleep(POLL_S)
                continue
            if now.is_over:
                write(log[written:])
                return now
            written = asyncio.run(self._tail(submission_id, written, write))
            time.sleep(POLL_S)

    async def _tail(self, submission_id: str, written: int, write: Callable[[str], None]) -> int:
        """Write what lies behind the first `written` characters, as it comes, until the stream ends; returns how many
        there are then."""
        seen = 0
        try:
            async for text in self._client.tail_job_logs(submission_id):
                start = max(0, written - seen)
                seen += len(text)
                if text[start:]:
                    write(text[start:])
                    written = seen
        except (RuntimeError, aiohttp.ClientError):
            pass  # the next one goes on from there
        return written

    def stop(self, submission: Submission) -> str:
        """Let the job finish what is in flight, and wait for it; returns how it ended."""
        with self._explained():
            self._client.stop_job(submission.id)
        while not (now := self.get(submission.id)).is_over:
            time.sleep(POLL_S)
        return str(now.state)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            raise UserError(
                f"{self.address} does not let you in ({reason.strip()}). Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to "
                "the cluster's token."
            ) from None
        except (ConnectionError, requests.RequestException):
            raise UserError(_no_cluster(self.address)) from None


def _check(address: str) -> None:
    """Raises UserError where something else than a cluster of our Ray answers, or nothing in time."""
    if not re.match(r"https?://[^/]", address):
        raise UserError(f"--address must be that of the cluster's dashboard, such as http://head:8265, is {address!r}")
    try:
        answer = requests.get(f"{address}/api/version", timeout=CONNECT_S)
        if answer.status_code in (401, 403):
            return  # Ray's client knows what to do about it
        there = str(answer.json()["ray_version"])
    except (requests.ConnectionError, requests.Timeout):
        raise UserError(_no_cluster(address)) from None
    except (requests.RequestException, ValueError, KeyError, TypeError):
        raise UserError(
            f"what answers at {address} is not a Ray dashboard; it listens on port 8265 of the head"
        ) from None
    if there.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise UserError(
            f"the cluster at {address} runs Ray {there}; this moray needs {ray.__version__.rpartition('.')[0]}.x there"
        )


def _no_cluster(address: str) -> str:
    return (
        f"no Ray cluster answers at {address}. It must be the head's dashboard (port 8265), reachable "
        "from here; on Kubernetes: kubectl port-forward svc/NAME-head-svc 8265"
    )


def _busy(submission_id: str, output: str, address: str) -> str:
    return (
        f"{output} is being written by {submission_id}. See it: moray logs {submission_id} --address {address}; "
        f"stop it: moray cancel {submission_id} --address {address}"
    )
