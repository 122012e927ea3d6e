"""What a rehearsal needs of the machine. Where it isn't there, nothing is rehearsed, and the summary says so."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.deploy.manifests import needs_kubectl
from tests.deploy.rehearsal.node.network import impossible

_PROGRAMS = [name for name in ("curl", "openssl") if shutil.which(name) is None]

needs_namespaces = pytest.mark.skipif(
    bool(impossible()), reason=f"THE DEPLOYMENT IS NOT REHEARSED HERE: {impossible()}"
)
REHEARSABLE = [
    needs_kubectl,
    needs_namespaces,
    pytest.mark.skipif(bool(_PROGRAMS), reason=f"THE DEPLOYMENT IS NOT REHEARSED HERE: no {', '.join(_PROGRAMS)}"),
]
# Minutes.
ON_REQUEST = [
    *REHEARSABLE,
    pytest.mark.skipif(
        os.environ.get("GRAFT_REHEARSE") != "1", reason="NOT REHEARSED: minutes; `make rehearse-kubectl` runs it"
    ),
]
