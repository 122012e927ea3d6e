"""The volumes of a pod as directories of this machine, with the owners and modes that the kubelet gives them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from tests.deploy.manifests import Document
from tests.deploy.rehearsal.node.variables import decoded, quantity
from tests.deploy.rehearsal.objects import Missing, Objects


class Volumes:
    """Of one pod. `claims` is where the volumes of claims lie: they outlive pods."""

    def __init__(self, objects: Objects, spec: Document, home: Path, claims: Path) -> None:
        self._objects = objects
        self._volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        self._group: int | None = spec.get("securityContext", {}).get("fsGroup")
        self._home = home
        self._claims = claims

    def prepare(self) -> None:
        """Raises Missing while an object isn't there that a volume needs."""
        for name, volume in self._volumes.items():
            if "persistentVolumeClaim" in volume:
                self._prepare_claim(volume["persistentVolumeClaim"]["claimName"])
            elif "emptyDir" in volume:
                directory = self._home / name
                if not directory.exists():
                    directory.mkdir(parents=True)
                    directory.chmod(0o777)
                    self._give_to_group(directory)
            else:
                self.refresh(name)

    def path(self, name: str) -> Path:
        volume = self._volumes[name]
        if "persistentVolumeClaim" in volume:
            return self._claims / str(volume["persistentVolumeClaim"]["claimName"])
        return self._home / name

    def is_read_only(self, name: str) -> bool:
        volume = self._volumes[name]
        return (
            "configMap" in volume
            or "secret" in volume
            or volume.get("persistentVolumeClaim", {}).get("readOnly", False)
        )

    def size_of_memory(self, name: str) -> int | None:
        """Bytes of a volume in memory; None: it is on a disk."""
        volume = self._volumes[name].get("emptyDir", {})
        return int(quantity(volume["sizeLimit"])) if volume.get("medium") == "Memory" else None

    def too_large(self) -> list[str]:
        """Volumes that hold more than their limit: the kubelet evicts a pod with one."""
        problems = []
        for name, volume in self._volumes.items():
            limit = volume.get("emptyDir", {}).get("sizeLimit")
            if limit and _bytes_below(self._home / name) > quantity(limit):
                problems.append(f"emptyDir {name} holds more than {limit}")
        return problems

    def refresh_all(self) -> None:
        """Bring in what has changed. What was deleted stays as it was, as long as the pod runs."""
        for name, volume in self._volumes.items():
            if "configMap" in volume or "secret" in volume:
                with contextlib.suppress(Missing):
                    self.refresh(name)

    def refresh(self, name: str) -> None:
        """Files of a ConfigMap or a Secret: links into a directory that is replaced at once when they change."""
        kind = "ConfigMap" if "configMap" in self._volumes[name] else "Secret"
        source = self._volumes[name].get("configMap") or self._volumes[name]["secret"]
        document = self._objects.find(kind, source.get("name") or source["secretName"])
        if document is None:
            raise Missing(f"{kind} {source.get('name') or source['secretName']}")
        entries, directory = decoded(document), self._home / name
        current = directory / "..data"
        if current.exists() and {path.name: path.read_bytes() for path in current.iterdir()} == entries:
            return
        version = directory / f"..{secrets.token_hex(4)}"
        version.mkdir(parents=True)
        for key, content in entries.items():
            path = version / key
            path.write_bytes(content)
            path.chmod(source.get("defaultMode", 0o644) | (0o440 if self._group else 0))
            if self._group:
                os.chown(path, 0, self._group)
            if not (directory / key).is_symlink():
                (directory / key).symlink_to(f"..data/{key}")
        former = current.resolve() if current.exists() else None
        (directory / "..data_tmp").symlink_to(version.name)
        (directory / "..data_tmp").rename(current)
        if former:
            shutil.rmtree(former)

    def _prepare_claim(self, claim: str) -> None:
        if self._objects.find("PersistentVolumeClaim", claim) is None:
            raise Missing(f"PersistentVolumeClaim {claim}")
        directory = self._claims / claim
        if not directory.exists():
            directory.mkdir(parents=True)
            directory.chmod(0o755)
        self._give_to_group(directory)

    def _give_to_group(self, directory: Path) -> None:
        """`fsGroup`: of that group and writable for it, where the top directory isn't already (OnRootMismatch)."""
        if self._group is None or directory.stat().st_gid == self._group:
            return
        for path in (directory, *directory.rglob("*")):
            if not path.is_symlink():
                os.chown(path, -1, self._group)
                path.chmod(path.stat().st_mode | (0o2770 if path.is_dir() else 0o660))


def _bytes_below(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += (Path(folder) / name).lstat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total
