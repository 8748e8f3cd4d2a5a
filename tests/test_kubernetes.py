"""The Kubernetes manifest is valid, and what it says fits together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from suite.cli import _overrides
from suite.config import CONFIGS
from suite.harness.sweep import read_sweep

SCHEMA = json.loads((Path(__file__).parent / "jobset_schema.json").read_text())


@pytest.fixture
def manifest() -> Any:
    return yaml.safe_load((CONFIGS.parent / "deploy/kubernetes/jobset.yaml").read_text())


def job_of(manifest: Any) -> Any:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def container_of(manifest: Any) -> Any:
    return job_of(manifest)["template"]["spec"]["containers"][0]


def test_the_manifest_is_a_valid_jobset(manifest: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(manifest, SCHEMA)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m.update(apiVersion="jobset.x-k8s.io/v1"),
        lambda m: m["spec"]["network"].update(enableDnsHostnames=True),
        lambda m: job_of(m).update(paralelism=2),
        lambda m: job_of(m)["template"]["spec"].update(restartPolicy="Always"),
        lambda m: container_of(m)["env"].append({"name": "N", "value": 2}),
        lambda m: container_of(m).pop("image"),
    ],
)
def test_the_schema_finds_what_kubernetes_would_refuse_or_drop(
    manifest: Any, spoil: Callable[[Any], Any]
) -> None:
    spoil(manifest)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


def test_nodes_names_ranks_and_volumes_agree(manifest: Any) -> None:
    job, container = job_of(manifest), container_of(manifest)
    env = {item["name"]: item["value"] for item in container["env"]}
    name, group = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"][0]["name"]
    assert env["HEAD"] == f"{name}-{group}-0-0.{name}"  # pod 0 of job 0, in the JobSet's domain
    assert job["parallelism"] == job["completions"] == int(env["NODES"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nproc-per-node={gpus}" in container["args"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}


def test_the_sweep_that_it_runs_exists_and_has_as_many_ranks(manifest: Any) -> None:
    args, nodes = container_of(manifest)["args"], job_of(manifest)["parallelism"]
    after = args.index("sweep")
    options = _overrides([word for word in args[after:] if "=" in word and not word.startswith("-")])
    cohorts = read_sweep(CONFIGS.parent / args[after + 1], options)
    assert {cell.world_size // cell.ranks_per_node for c in cohorts for cell in c.cells} == {nodes}
