"""A command inside a Ray job uses the job's Ray, and keeps what it writes out of the job's working directory."""

import json
from pathlib import Path

import pytest

from moecluster.cli.common.model_target import in_job, read_target
from moecluster.cli.common.ray_job import RayJob, current_job, kept_path

JOB = RayJob(id="raysubmit_1", ray_address="10.0.0.10:6379")
INSIDE = {
    "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1"}}),
    "RAY_ADDRESS": "10.0.0.10:6379",
}


def test_the_job_is_known_by_what_ray_puts_into_its_environment() -> None:
    assert current_job(INSIDE) == JOB


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RAY_ADDRESS": "10.0.0.10:6379"},
        {**INSIDE, "RAY_ADDRESS": ""},
        {**INSIDE, "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"},
        {**INSIDE, "RAY_JOB_CONFIG_JSON_ENV_VAR": "no JSON"},
        {**INSIDE, "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": null}'},
    ],
)
def test_anything_else_is_no_job(environment: dict[str, str]) -> None:
    assert current_job(environment) is None


def test_a_job_uses_its_ray_and_writes_below_the_home_directory() -> None:
    config = in_job(read_target("demo", ()), JOB)
    assert config.cluster.address == JOB.ray_address
    assert config.train.output_dir == str(Path.home() / "runs/moecluster")
    assert config.model == read_target("demo", ()).model


def test_what_the_user_says_holds_in_a_job_too() -> None:
    given = read_target("demo", ["cluster.address=10.9.9.9:1", "train.output_dir=/shared/run"])
    assert in_job(given, JOB) == given


def test_outside_of_jobs_nothing_changes() -> None:
    config = read_target("demo", ())
    assert in_job(config, None) is config
    assert kept_path("out.jsonl") == Path("out.jsonl")


def test_relative_paths_of_a_job_lie_below_the_home_directory() -> None:
    assert kept_path("runs/out.jsonl", JOB) == Path.home() / "runs" / "out.jsonl"
    assert kept_path("/data/out.jsonl", JOB) == Path("/data/out.jsonl")
