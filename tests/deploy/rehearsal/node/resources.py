"""What pods ask of their node, and whether there is room for them."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from tests.deploy.manifests import Document
from tests.deploy.rehearsal.node.variables import quantity


@dataclass(frozen=True)
class Resources:
    """Cores, and bytes of memory."""

    cpu: Decimal = Decimal(0)
    memory: Decimal = Decimal(0)

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.cpu + other.cpu, self.memory + other.memory)

    def __sub__(self, other: Resources) -> Resources:
        return Resources(self.cpu - other.cpu, self.memory - other.memory)

    def __str__(self) -> str:
        return f"{self.cpu} cores and {self.memory / 2**30:.2f} GiB"

    def fit_in(self, room: Resources) -> bool:
        return self.cpu <= room.cpu and self.memory <= room.memory


# 4 cores and 8 GiB, less what the pods of kind itself ask for.
LAPTOP = Resources(Decimal("3.05"), Decimal(2**30) * Decimal("7.7"))


def requests(spec: Document) -> Resources:
    """Of a pod: its containers run together, its init containers one after the other before them."""
    together = sum(map(_of_container, spec["containers"]), Resources())
    for container in reversed(spec.get("initContainers", [])):
        own = _of_container(container)
        if container.get("restartPolicy") == "Always":
            together += own
        else:
            together = Resources(max(together.cpu, own.cpu), max(together.memory, own.memory))
    return together


def _of_container(container: Document) -> Resources:
    asked = container.get("resources", {}).get("requests", {})
    return Resources(quantity(asked.get("cpu", 0)), quantity(asked.get("memory", 0)))
