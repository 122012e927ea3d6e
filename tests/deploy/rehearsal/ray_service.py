"""What the KubeRay operator would make of a RayService, without Ray: `engineless.py` is the one replica of a worker."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from tests.deploy.manifests import Document


def service_of(document: Document) -> Document:
    """The Service in front of the workers."""
    wanted = copy.deepcopy(document["spec"]["serveService"])
    labels = _worker_group(document)["template"]["metadata"]["labels"]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": document["metadata"]["namespace"], **wanted["metadata"]},
        "spec": {**wanted["spec"], "selector": labels},
    }


def head_of(document: Document) -> Document:
    """The head's pod: its init containers, then nothing."""
    template = copy.deepcopy(document["spec"]["rayClusterConfig"]["headGroupSpec"]["template"])
    _run(template, ["sleep", "infinity"])
    return template


def worker_of(document: Document) -> Document:
    """A worker's pod: it serves what the serve configuration says, with the settings that are mounted there."""
    template = copy.deepcopy(_worker_group(document)["template"])
    (application,) = yaml.safe_load(document["spec"]["serveConfigV2"])["applications"]
    _run(template, ["python", "/usr/local/bin/engineless.py", "settings", application["args"]["settings_file"]])
    return template


def _run(template: Document, command: list[str]) -> None:
    container: dict[str, Any] = template["spec"]["containers"][0]
    container["command"], container["args"] = ["tini", "--"], command
    for probe in ("startupProbe", "livenessProbe", "lifecycle"):  # they ask Ray
        container.pop(probe, None)
    if "httpGet" not in container["readinessProbe"] or container["readinessProbe"]["httpGet"]["port"] != "serve":
        del container["readinessProbe"]


def _worker_group(document: Document) -> Document:
    (group,) = document["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return dict(group)
