"""Where images and packages come from: names, digests, licences, and the lists of what is inside."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

import pytest

from tests.deploy.manifests import DEPLOY, OVERLAYS, ROOT, containers, needs_kubectl, pod_templates, rendered
from tests.deploy.test_image import PROJECT, packages

create, locks = sys.modules["create"], sys.modules["locks"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
VERSION = PROJECT["version"]
LOCKS = sorted(path.stem for path in packages.ENVIRONMENT.glob("*.lock"))

# REGISTRY/graft-convert:VERSION, REGISTRY/graft-serve:VERSION and, for CPUs, VERSION-cpu.
REGISTRIES = ("localhost", "registry.example.com", "your.registry")
NAME = re.compile(r"(?<![\w/.-])((?:[\w.-]+/)*)graft-(serve|convert):([\w.-]*\w)")
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DEPLOY / "image" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


debian_packages = load("debian_packages")


def is_one_of_ours(registry: str, image: str, tag: str) -> bool:
    tags = {VERSION, f"{VERSION}-cpu"} if image == "serve" else {VERSION}
    return registry.rstrip("/") in REGISTRIES and tag in tags


def test_every_image_is_named_by_one_scheme() -> None:
    pages = [ROOT / "README.md", ROOT / "Dockerfile", *(ROOT / "docs").rglob("*.md"), *DEPLOY.rglob("*.md")]
    scripts = [path for kind in ("yaml", "py", "sh") for path in DEPLOY.rglob(f"*.{kind}")]
    names = [(path, *match) for path in (*pages, *scripts) for match in NAME.findall(path.read_text())]

    assert len(names) > 10
    scheme = [["REGISTRY/", "serve", "VERSION"], ["REGISTRY/", "convert", "VERSION"]]
    wrong = [(str(path), name) for path, *name in names if name not in scheme and not is_one_of_ours(*name)]
    # The page on upgrades shows the next version.
    assert [each for each in wrong if not each[0].endswith("upgrade.md")] == []


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_run_images_of_that_scheme_or_by_digest(overlay: str) -> None:
    for document in rendered(overlay):
        for pod, template in pod_templates(document):
            for container in containers(template):
                match = NAME.fullmatch(container["image"])
                ours = match is not None and is_one_of_ours(*match.groups())
                assert ours or DIGEST.search(container["image"]), (pod, container["image"])


def test_images_are_built_from_a_base_of_one_digest() -> None:
    (base,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    sources = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)

    assert DIGEST.search(base)
    assert {source for source, _ in sources} <= {"${BASE_IMAGE}", *(stage for _, stage in sources)}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_of_a_lock_has_files_with_digests(lock: str) -> None:
    pins = packages.read_lock(packages.ENVIRONMENT / f"{lock}.lock")

    assert [pin for pin in pins if not locks.files_of(pin)] == []


def test_no_digest_is_of_a_package_that_no_lock_names() -> None:
    locked = [pin for lock in LOCKS for pin in packages.read_lock(packages.ENVIRONMENT / f"{lock}.lock")]
    parts = [pin.partition("==") for pin in locked]
    pins = {f"{locks.normalized(name)}=={version}" for name, _, version in parts}

    assert set(locks.files_by_pin()) - pins == {"torch==2.13.0+cpu"}


def test_images_take_packages_through_the_lock_only() -> None:
    installs = re.findall(r"pip install (.+)", DOCKERFILE)

    assert [line.split(" \\")[0] for line in installs] == ["--no-deps --no-build-isolation --prefix /layer/opt/graft ."]


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index for the real pip: a directory, and no other."""
    directory = tmp_path / "wheels"
    directory.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(directory), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    return directory


def wheel(directory: Path, version: str, cuda: str | None) -> Path:
    """A torch that consists of the file with its version."""
    path = directory / f"torch-{version}-py3-none-any.whl"
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("torch/version.py", f"__version__ = {version!r}\ncuda = {cuda!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def know(monkeypatch: pytest.MonkeyPatch, digests: dict[str, str]) -> None:
    monkeypatch.setattr(locks, "digests", lambda: digests)
    locks.files_by_pin.cache_clear()


@pytest.fixture(autouse=True)
def forgotten() -> None:
    locks.files_by_pin.cache_clear()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def installed(root: Path) -> list[str]:
    return [path.read_text().split("'")[1] for path in root.rglob("torch/version.py")]


def install_torch_for_cuda(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(packages, "read_lock", lambda _: ["torch==2.13.0"])
    packages.install("torch", "cuda", root)


def test_a_file_with_other_bytes_is_not_installed(
    wheels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = wheel(wheels, "2.13.0", "13.0")
    know(monkeypatch, {original.name: sha256(original)})
    install_torch_for_cuda(monkeypatch, tmp_path / "first")
    assert installed(tmp_path / "first") == ["2.13.0"]

    wheel(wheels, "2.13.0", "13.1")
    with pytest.raises(create.SetUpError, match="DO NOT MATCH THE HASHES"):
        install_torch_for_cuda(monkeypatch, tmp_path / "second")
    assert installed(tmp_path / "second") == []


def test_an_index_with_both_builds_of_torch_never_gives_cuda_the_one_for_cpus(
    wheels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By pip's order 2.13.0+cpu is newer than 2.13.0."""
    cuda, cpu = wheel(wheels, "2.13.0", "13.0"), wheel(wheels, "2.13.0+cpu", None)
    know(monkeypatch, {cuda.name: sha256(cuda), cpu.name: sha256(cpu)})
    with pytest.raises(create.SetUpError):
        install_torch_for_cuda(monkeypatch, tmp_path / "mixed")
    assert installed(tmp_path / "mixed") == []

    cpu.unlink()
    install_torch_for_cuda(monkeypatch, tmp_path / "cuda")
    assert installed(tmp_path / "cuda") == ["2.13.0"]


def test_a_torch_without_cuda_ends_the_build_whatever_its_version_says(
    wheels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rebuilt = wheel(wheels, "2.13.0", None)
    know(monkeypatch, {rebuilt.name: sha256(rebuilt)})

    with pytest.raises(create.SetUpError, match=r"torch\.version\.cuda: None.*expected the build for CUDA"):
        install_torch_for_cuda(monkeypatch, tmp_path / "root")


@pytest.mark.parametrize(("cuda", "cpu_only"), [("13.0", True), (None, False)])
def test_an_environment_with_the_other_torch_is_refused(tmp_path: Path, cuda: str | None, cpu_only: bool) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages" / "torch"
    site.mkdir(parents=True)
    (site / "version.py").write_text(f"__version__ = '2.13.0'\ncuda = {cuda!r}\n")

    create.check_torch(tmp_path, cpu_only=not cpu_only)
    with pytest.raises(create.SetUpError, match="PIP_FIND_LINKS"):
        create.check_torch(tmp_path, cpu_only=cpu_only)


STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Source: glibc (2.36-9)
Version: 2.36-9+deb12u10
Description: GNU C Library
 Contains the standard libraries.

Package: removed
Status: deinstall ok config-files
Architecture: all
Version: 1:2

Package: tzdata
Status: install ok installed
Architecture: all
Version: 1:2025b-0
"""


def test_the_list_of_contents_has_the_packages_of_debian() -> None:
    whole = debian_packages.with_debian({"components": [{"name": "vllm"}], "bomFormat": "CycloneDX"}, STATUS)

    assert whole["bomFormat"] == "CycloneDX"
    assert [each.get("purl") for each in whole["components"]] == [
        None,
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64&distro=debian-12",
        "pkg:deb/debian/tzdata@1%3A2025b-0?arch=all&distro=debian-12",
    ]


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="no machine with Debian's packages")
def test_it_names_what_dpkg_names() -> None:
    shown = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status}\t${Package}\t${Version}\t${Architecture}\n"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    expected = sorted(line.split("\t")[1:] for line in shown.splitlines() if line.startswith("installed\t"))

    packages_of_debian = debian_packages.installed(Path("/var/lib/dpkg/status").read_text())
    assert expected == sorted([each["Package"], each["Version"], each["Architecture"]] for each in packages_of_debian)


def stages() -> dict[str, str]:
    parts = re.split(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    return {
        name: f"FROM {source}\n{text}" for source, name, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    }


@pytest.mark.parametrize("target", ["convert", "serve-cpu", "serve-cuda"])
def test_nothing_is_installed_into_an_image_after_its_contents_were_listed(target: str) -> None:
    final, listed = stages()[target], stages()[f"{target}-sbom"]

    assert final.startswith(f"FROM {target}-files\n")
    assert "RUN" not in final
    assert f"COPY --from={target}-sbom /graft.cdx.json /usr/share/sbom/" in final
    assert set(re.findall(r"from=(\S+?),", listed)) == {f"{target}-files"}
    assert "source=/var/lib/dpkg" in listed


def test_pods_that_ask_for_no_gpu_see_none() -> None:
    assert "NVIDIA_VISIBLE_DEVICES=" not in re.sub(r"^#.*$", "", DOCKERFILE, flags=re.MULTILINE)


# Families of licences that oblige whoever passes an image on.
OBLIGING = {
    "GPL-2.0": r"\bGPL-2\.0|GNU General Public License v2",
    "GPL-3.0": r"\bGPL-3\.0|GNU General Public License v3",
    "LGPL": r"LGPL|Lesser General Public License",
    "MPL-2.0": r"MPL-2\.0|MPL 2\.0|Mozilla Public License 2",
    "NVIDIA": r"NVIDIA Proprietary|LicenseRef-NVIDIA",
}


def test_the_label_names_the_licences_of_what_is_inside() -> None:
    labels = re.findall(r'image\.licenses="([^"]+)"', DOCKERFILE)
    of_cuda = labels[1]
    assert all(label.startswith("Apache-2.0 AND ") for label in labels)
    for distribution in distributions():
        if packages.layer_of(f"{distribution.name}==0") is None:
            continue
        metadata = distribution.metadata
        said = " ".join([
            metadata.get("License-Expression") or "",
            (metadata.get("License") or "")[:200],
            *(each for each in metadata.get_all("Classifier") or [] if each.startswith("License")),
        ])  # fmt: skip
        for family, words in OBLIGING.items():
            if re.search(words, said):
                assert family in of_cuda, (distribution.name, said)
