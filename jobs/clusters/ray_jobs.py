"""RayCluster: submit and manage jobs of a Ray cluster through its dashboard's job API, with errors users can act on."""

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

from moray.engine.errors import JobError, UserError
from moray.jobs.clusters.submission import NAME_KEY, OUTPUT_KEY, Submission, next_id, select

CONNECT_S = 10.0  # for the dashboard to answer the first request
LOST_S = 60.0  # time without an answer after which the cluster counts as lost
POLL_S = 1.0  # between two requests for the state of a job


class RayCluster:
    """Submits, finds and stops the jobs of moray on a Ray cluster.

    address: URL of the dashboard, such as http://head:8265

    Raises UserError where no cluster with our version of Ray answers there.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        _check(self.address)
        # Ray prefers this variable to the address that it is given, so it must have the same value.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.ERROR)
        with self._translate_errors():
            self._client = JobSubmissionClient(self.address)

    def submissions(self) -> list[Submission]:
        """Return moray's submissions, the first one first."""
        with self._translate_errors():
            found = self._client.list_jobs()
        ours = [
            Submission.of(job) for job in found if job.metadata and OUTPUT_KEY in job.metadata and job.submission_id
        ]
        return sorted(ours, key=lambda submission: submission.started_s)

    def find(self, target: str) -> Submission:
        """Return the latest submission of a job, by its name, output folder or submission id. Raises UserError."""
        return select(self.submissions(), target, self.address)

    def submit(self, name: str, output: str, entrypoint: str, working_dir: Path, env: Mapping[str, str]) -> Submission:
        """Submit a job. Its id has the job's name, its output folder and a growing number: Ray accepts no id twice.

        Raises UserError where a submission with this output folder is not over.
        """
        output = output.rstrip("/")
        same = [one for one in self.submissions() if one.output == output]
        if running := [one for one in same if not one.is_over]:
            raise UserError(_busy(running[-1].id, output, self.address))
        submission_id = next_id(name, output, [one.id for one in same])
        try:
            with self._translate_errors():
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=submission_id,
                    metadata={NAME_KEY: name, OUTPUT_KEY: output},
                    runtime_env={"working_dir": str(working_dir), "env_vars": dict(env)},
                )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise JobError(f"{self.address} did not accept the job: {error}") from None
            raise UserError(_busy(submission_id, output, self.address)) from None
        return self.get(submission_id)

    def get(self, submission_id: str) -> Submission:
        """Return a submission with its present state. Raises UserError where the cluster does not answer."""
        with self._translate_errors():
            return Submission.of(self._client.get_job_info(submission_id))

    def logs(self, submission_id: str) -> str:
        """Return the log of a submission so far. Raises UserError where the cluster does not answer."""
        with self._translate_errors():
            return str(self._client.get_job_logs(submission_id))

    def follow(self, submission_id: str, write: Callable[[str], None]) -> Submission:
        """Write the log as it grows until the job is over. A stream may end before the job does; it is then reopened.

        Raises JobError where the cluster has not answered for LOST_S.
        """
        written, last_answer_s = 0, time.monotonic()
        while True:
            try:
                now = self.get(submission_id)
                log = self.logs(submission_id) if now.is_over else ""
                last_answer_s = time.monotonic()
            except UserError:
                if time.monotonic() - last_answer_s > LOST_S:
                    raise JobError(f"{self.address} does not answer any more; the job may still run there") from None
                time.sleep(POLL_S)
                continue
            if now.is_over:
                write(log[written:])
                return now
            written = asyncio.run(self._tail(submission_id, written, write))
            time.sleep(POLL_S)

    async def _tail(self, submission_id: str, written: int, write: Callable[[str], None]) -> int:
        """Write the log after its first `written` characters, as it grows, until the stream ends. Return how many
        characters are written then."""
        seen = 0
        try:
            async for text in self._client.tail_job_logs(submission_id):
                start = max(0, written - seen)
                seen += len(text)
                if text[start:]:
                    write(text[start:])
                    written = seen
        except (RuntimeError, aiohttp.ClientError):
            pass  # the next stream continues there
        return written

    def stop(self, submission: Submission) -> str:
        """Stop a job after its shards in flight, wait for that, and return its final state."""
        with self._translate_errors():
            self._client.stop_job(submission.id)
        while not (now := self.get(submission.id)).is_over:
            time.sleep(POLL_S)
        return str(now.state)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            raise UserError(
                f"{self.address} denies access ({reason.strip()}). Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to "
                "the cluster's token."
            ) from None
        except (ConnectionError, requests.RequestException):
            raise UserError(_no_cluster(self.address)) from None


def _check(address: str) -> None:
    """Raise UserError where nothing answers in time, or something else than a cluster with our version of Ray."""
    if not re.match(r"https?://[^/]", address):
        raise UserError(f"--address must be that of the cluster's dashboard, such as http://head:8265, is {address!r}")
    try:
        answer = requests.get(f"{address}/api/version", timeout=CONNECT_S)
        if answer.status_code in (401, 403):
            return  # Ray's client handles it
        their_version = str(answer.json()["ray_version"])
    except (requests.ConnectionError, requests.Timeout):
        raise UserError(_no_cluster(address)) from None
    except (requests.RequestException, ValueError, KeyError, TypeError):
        raise UserError(
            f"what answers at {address} is not a Ray dashboard; it listens on port 8265 of the head"
        ) from None
    if their_version.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise UserError(
            f"the cluster at {address} runs Ray {their_version}; this moray needs "
            f"{ray.__version__.rpartition('.')[0]}.x there"
        )


def _no_cluster(address: str) -> str:
    return (
        f"no Ray cluster answers at {address}. It must be the head's dashboard (port 8265), reachable "
        "from here; on Kubernetes: kubectl port-forward svc/NAME-head-svc 8265"
    )


def _busy(submission_id: str, output: str, address: str) -> str:
    return (
        f"{output} is being written by {submission_id}. Follow it: moray logs {submission_id} --address {address}; "
        f"stop it: moray cancel {submission_id} --address {address}"
    )
