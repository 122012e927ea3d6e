"""Who vouches for an adapter: an Ed25519 signature (RFC 8032) of what a server decides by.

    graft-adapter/1
    <revision: digest of every byte of the adapter>
    <fingerprint of the base model it is for>
    <SHA-256 of golden.json, or ->

each with a line feed at its end. The name is not part of it: that is chosen when it is published. `manifest.sig` beside
the manifest holds the 64 bytes in Base64.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from convert.artifact import Artifact
from convert.errors import ArtifactInvalid, SigningKeyInvalid

SIGNATURE = "manifest.sig"
MAX_CHARACTERS = 128  # of a file that holds 88; what is longer is no signature, and kept nowhere


def statement(revision: str, base: str, golden: str | None) -> bytes:
    return f"graft-adapter/1\n{revision}\n{base}\n{golden or '-'}\n".encode()


def sign(artifact: Artifact, key: Path) -> Path:
    """Write `manifest.sig` of a verified artifact; returns its path. Raises ArtifactInvalid if it holds no adapter,
    SigningKeyInvalid."""
    manifest = artifact.manifest
    if manifest.adapter is None:
        raise ArtifactInvalid(f"{artifact.root} holds a merged model: only adapters are signed.")
    signed = statement(manifest.adapter.revision, manifest.model.fingerprint, manifest.golden)
    path = artifact.root / SIGNATURE
    path.write_text(base64.b64encode(_private(key).sign(signed)).decode() + "\n")
    return path


def signature_of(root: Path) -> str | None:
    """What `manifest.sig` holds, of a longer file the begin; None if there is none."""
    path = root / SIGNATURE
    if not path.is_file():
        return None
    with path.open(errors="replace") as stream:
        return stream.read(MAX_CHARACTERS).strip()


def is_signed(signature: str | None, signed: bytes, keys: Sequence[Ed25519PublicKey]) -> bool:
    """Whether one of the keys made it."""
    try:
        content = base64.b64decode(signature or "", validate=True)
    except ValueError:
        return False
    return any(_fits(key, content, signed) for key in keys)


def public_key(path: Path) -> Ed25519PublicKey:
    """Raises SigningKeyInvalid unless the file is one in PEM."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SigningKeyInvalid(f"{path} is no public key in PEM: {error}.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise SigningKeyInvalid(f"{path} is no Ed25519 key. Take one of: openssl pkey -in KEY.pem -pubout")
    return key


def _private(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise SigningKeyInvalid(f"{path} is no private key in PEM without a password: {error}.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningKeyInvalid(f"{path} is no Ed25519 key. Make one with: openssl genpkey -algorithm ed25519")
    return key


def _fits(key: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True
