"""The Ray job that a command runs in, if any: started by `moecluster submit`, or by plain `ray job submit`.

Inside a job the Ray that runs it is the one to use, and what the command writes must outlive the job's working
directory, which Ray removes.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Set by Ray's job supervisor for the job's command, and inherited by what that starts.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
ADDRESS_VARIABLE = "RAY_ADDRESS"


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """The job of this process."""

    id: str  # as `moecluster jobs` lists it
    ray_address: str  # host:port of its Ray, for cluster.address


def current_job(environment: Mapping[str, str] = os.environ) -> RayJob | None:
    """Returns the job that this process belongs to; None outside of jobs."""
    try:
        metadata = json.loads(environment.get(JOB_VARIABLE, "null"))["metadata"]
        job_id = str(metadata["job_submission_id"])
    except (ValueError, TypeError, KeyError):
        return None
    address = environment.get(ADDRESS_VARIABLE, "")
    return RayJob(id=job_id, ray_address=address) if address else None


def kept_path(path: str | Path, job: RayJob | None = None) -> Path:
    """Returns where a command writes a file: inside a job, a relative path lies below the home directory.

    job: default is that of this process.
    """
    written = Path(path)
    inside = job if job is not None else current_job()
    return Path.home() / written if inside is not None and not written.is_absolute() else written
