"""Add the packages of Debian to a list of what is in an image.

    debian_packages.py /var/lib/dpkg/status python.cdx.json > graft.cdx.json

The list is CycloneDX JSON. Each installed package becomes a component with the version and the architecture that dpkg
names, under the package URL by which scanners look for known faults.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

DISTRIBUTION = "debian-12"


def installed(status: str) -> Iterator[dict[str, str]]:
    """The fields of each installed package, in dpkg's form: a paragraph each, further lines of a field indented."""
    for paragraph in status.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line and not line[0].isspace()]
        fields = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if fields.get("Status", "").endswith(" installed"):
            yield fields


def component(fields: dict[str, str]) -> dict[str, Any]:
    name, version, architecture = (fields[field] for field in ("Package", "Version", "Architecture"))
    url = f"pkg:deb/debian/{quote(name)}@{quote(version, safe='')}?arch={architecture}&distro={DISTRIBUTION}"
    described = {"type": "library", "bom-ref": url, "name": name, "version": version, "purl": url}
    source = fields.get("Source", "").partition(" ")[0]
    return described | ({"properties": [{"name": "debian:source", "value": source}]} if source else {})


def with_debian(document: dict[str, Any], status: str) -> dict[str, Any]:
    packages = sorted((component(fields) for fields in installed(status)), key=lambda each: str(each["purl"]))
    return document | {"components": [*document.get("components", []), *packages]}


def main() -> None:
    status, document = sys.argv[1:]
    whole = with_debian(json.loads(Path(document).read_text()), Path(status).read_text())
    json.dump(whole, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
