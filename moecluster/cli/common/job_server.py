"""Ray's job server, a part of the dashboard on a cluster's head: submits, lists, follows and stops jobs over HTTP.

Ray's client lacks timeouts, and lets RAY_ADDRESS override the address that it is given; both are mended here.
Importing Ray takes a second and reads its authentication from the environment, so that is done last.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from moecluster.errors import ClusterNotFound, ConfigError, DeadlineExceeded, MoeClusterError, Unavailable, UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"  # where `ray dashboard CLUSTER.yaml` forwards it to
CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 60.0
SILENCE_S = 15.0  # without a line of the log: then the job is asked for
PATIENCE_S = 120.0  # for a job server that was reached before
RETRY_S = 1.0
# Until Ray kills a job that was stopped: by default 3 s, in which a command cannot take its cluster down.
STOP_WAIT_VARIABLE, STOP_WAIT_S = "RAY_JOB_STOP_WAIT_TIME_S", 90
LAST_CHARACTERS = 300  # of what a failing job server says: its tracebacks end with what matters
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that was submitted to a cluster."""

    id: str
    status: str  # PENDING | RUNNING | SUCCEEDED | FAILED | STOPPED
    entrypoint: str
    submitted_s: float | None  # Unix time
    ended_s: float | None
    exit_code: int | None  # of the command; None: it has not ended by itself
    message: str

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.status in ENDED


def job_server_url(address: str | None) -> str:
    """Returns the URL of the job server: of --address, else of $RAY_API_SERVER_ADDRESS, else port 8265 of this host.

    Raises ConfigError.
    """
    given = address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    url = given if "://" in given else f"http://{given}"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port is not None
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f'--address: got "{given}", expected http://HOST:PORT of the dashboard of a Ray cluster')
    return url.rstrip("/")


class JobServer:
    """A client. Every call ends in time; errors are MoeClusterErrors of one line."""

    def __init__(self, url: str) -> None:
        """Raises ClusterNotFound if no job server answers there, ConfigError if it does not take the token."""
        self.url = url
        os.environ.pop("RAY_ADDRESS", None)
        os.environ[ADDRESS_VARIABLE] = url
        os.environ.setdefault("RAY_AUTH_MODE", "token" if ray_token_is_there() else "disabled")
        with self._translated():
            self._client = _make_client(url)

    def submit(self, entrypoint: str, *, package: Path | None, job_id: str | None) -> str:
        """Starts a job, and returns its id. package: a .zip with the files of its working directory."""
        # What is written here is shown by the dashboard: no secrets.
        runtime_env: dict[str, Any] = {"env_vars": {STOP_WAIT_VARIABLE: str(STOP_WAIT_S)}}
        if package is not None:
            runtime_env["working_dir"] = str(package)
        with self._translated():
            return str(
                self._client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env, submission_id=job_id or None)
            )

    def jobs(self) -> list[Job]:
        """Returns the jobs that were submitted, the oldest first."""
        with self._translated():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.submitted_s or 0.0)

    def job(self, job_id: str) -> Job:
        """Returns a job. Raises UserError if there is none of this id."""
        with self._translated(job_id):
            return _job(self._client.get_job_info(job_id))

    def stop(self, job_id: str) -> bool:
        """Asks a job to end. Returns whether it was running. Raises UserError if there is none of this id."""
        with self._translated(job_id):
            return bool(self._client.stop_job(job_id))

    def wait(self, job_id: str, timeout_s: float) -> Job:
        """Waits until a job has ended. Raises DeadlineExceeded."""
        deadline_s = time.monotonic() + timeout_s
        while not (found := self.job(job_id)).ended:
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(f"the job {job_id} has not ended within {timeout_s:g} s; it is {found.status}")
            time.sleep(RETRY_S)
        return found

    async def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Passes on the log of a job until it ends, and returns the job. Reconnects for PATIENCE_S if it must."""
        written = 0
        lost_since_s: float | None = None
        while True:
            try:
                async for text in self._log(job_id, written):
                    written, lost_since_s = written + len(text), None
                    write(text)
                found = await asyncio.to_thread(self.job, job_id)
                if found.ended:
                    return found
            except (Unavailable, ClusterNotFound) as exc:
                lost_since_s = lost_since_s or time.monotonic()
                if time.monotonic() > lost_since_s + PATIENCE_S:
                    raise Unavailable(f"{exc}; the job {job_id} may go on: moecluster jobs lists it") from exc
            await asyncio.sleep(RETRY_S)

    async def _log(self, job_id: str, skip: int) -> Any:
        """Yields the log from character `skip` on. Ends when the job server ends it. Raises Unavailable."""
        log: Any = self._client.tail_job_logs(job_id)  # an async generator, though typed as less
        chunk: asyncio.Task[str] | None = None
        try:
            while True:
                chunk = asyncio.ensure_future(_next(log))
                while not (await asyncio.wait({chunk}, timeout=SILENCE_S))[0]:
                    # Silence is normal, but not for a job that has ended, nor for a server that does not answer.
                    if (await asyncio.to_thread(self.job, job_id)).ended:
                        return
                with self._translated(job_id):
                    text = chunk.result()
                if not text:
                    return
                if text[skip:]:
                    yield text[skip:]
                skip = max(skip - len(text), 0)
        finally:
            if chunk is not None and not chunk.done():
                chunk.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await chunk
            await log.aclose()

    @contextmanager
    def _translated(self, job_id: str = "") -> Iterator[None]:
        """Turns what Ray's client raises into one line that says what would be right."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except MoeClusterError:
            raise
        except AuthenticationError as exc:
            raise ConfigError(
                f"the job server at {self.url} asks for a token, and that of this command is missing or another: put "
                "the path of a file with the cluster's token into RAY_AUTH_TOKEN_PATH, or the file to ~/.ray/auth_token"
            ) from exc
        except Exception as exc:  # requests', aiohttp's, RuntimeError with an answer's text, ValueError from JSON
            raise self._error(exc, job_id) from exc

    def _error(self, error: Exception, job_id: str) -> MoeClusterError:
        text = " ".join(str(error).split())
        if "status code 404" in text and job_id:
            return UserError(f"no job {job_id} at {self.url}; moecluster jobs lists them")
        if "status code" in text and "already exists" in text:
            return UserError(f"{self.url} has a job of this id already; give another --id")
        if "status code" in text and "404" not in text:
            return Unavailable(f"the job server at {self.url} failed: {text[-LAST_CHARACTERS:]}")
        return ClusterNotFound(
            f"no job server of Ray answers at {self.url} ({type(error).__name__}): give --address http://HOST:8265, "
            "that of the dashboard of a Ray cluster (not Ray's own, port 6379; ray dashboard CLUSTER.yaml forwards it "
            "to this host). The local Ray of moecluster up has none: there, run the command itself"
        )


def ray_token_is_there() -> bool:
    """Returns whether this process has a token for Ray, where Ray looks for it."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    with suppress(OSError, RuntimeError):
        return (Path.home() / ".ray" / "auth_token").stat().st_size > 0
    return False


def _make_client(url: str) -> "JobSubmissionClient":
    import logging

    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)
    for name in ("dashboard_sdk", "job.sdk"):  # these set their own level, and report each upload
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)

    class InTime(JobSubmissionClient):
        """With timeouts, which requests does not have by itself."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=(CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S), **options)

    return InTime(url)


async def _next(log: Any) -> str:
    """Returns the next piece of a log, "" at its end."""
    async for text in log:
        return str(text)
    return ""


def _job(details: Any) -> Job:
    def seconds(milliseconds: int | None) -> float | None:
        return milliseconds / 1000 if milliseconds else None

    return Job(
        id=details.submission_id,
        status=getattr(details.status, "value", str(details.status)),
        entrypoint=details.entrypoint,
        submitted_s=seconds(details.start_time),
        ended_s=seconds(details.end_time),
        exit_code=details.driver_exit_code,
        message=details.message or "",
    )
