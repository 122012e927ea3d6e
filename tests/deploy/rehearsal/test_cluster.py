"""The stand-in for a cluster refuses what a cluster would refuse."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from tests.deploy.rehearsal.controllers import Cluster
from tests.deploy.rehearsal.objects import Objects, Refused
from tests.deploy.rehearsal.requirements import needs_namespaces

NAMESPACE = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "graft"}}


def test_a_pod_without_its_service_account_is_refused() -> None:
    objects = Objects()
    objects.apply(NAMESPACE)
    spec = {"serviceAccountName": "graft", "containers": [{"name": "it", "image": "any"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "early", "namespace": "graft"}, "spec": spec}

    with pytest.raises(Refused, match="service account graft/graft"):
        objects.apply(pod)


@needs_namespaces
def test_a_pod_that_asks_for_more_than_the_laptop_has_is_not_started(tmp_path: Path) -> None:
    with contextlib.closing(Cluster(tmp_path)) as cluster:
        cluster.objects.apply(NAMESPACE)
        container = {"name": "large", "image": "any", "resources": {"requests": {"memory": "8Gi"}}}
        cluster.objects.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "large", "namespace": "graft"},
                "spec": {"containers": [container]},
            }
        )
        while not cluster.not_scheduled:
            time.sleep(0.1)

        assert "7.70 GiB left" in cluster.not_scheduled["Pod", "large"]
        assert cluster.pods() == []
