"""Signatures of adapters: Ed25519 (RFC 8032) over what a server verifies before it loads an adapter.

    graft-adapter/1
    <revision: digest of every byte of the adapter>
    <fingerprint of the base model it is for>
    <SHA-256 of golden.json, or ->

These four lines, each with a line feed at its end, are signed. The name is not signed, since it is chosen
when the adapter is published. `manifest.sig` beside the manifest holds the 64 bytes of the signature in Base64.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from convert.artifact.directory import Artifact
from convert.artifact.durable_files import replace_file
from convert.errors import ArtifactInvalid, SigningKeyInvalid

SIGNATURE = "manifest.sig"
# A signature has 88 characters; of a longer file only the beginning is read.
MAX_CHARACTERS = 128


def statement(revision: str, base: str, golden: str | None) -> bytes:
    """The signed bytes."""
    return f"graft-adapter/1\n{revision}\n{base}\n{golden or '-'}\n".encode()


def sign(artifact: Artifact, key: Path) -> Path:
    """Sign a verified artifact with a private key in PEM; returns the path of `manifest.sig`.

    Raises ArtifactInvalid if the artifact holds no adapter, and SigningKeyInvalid.
    """
    manifest = artifact.manifest
    if manifest.adapter is None:
        raise ArtifactInvalid(f"{artifact.root} holds a merged model: only adapters are signed.")
    signed = statement(manifest.adapter.revision, manifest.model.fingerprint, manifest.golden)
    path = artifact.root / SIGNATURE
    replace_file(path, base64.b64encode(_private(key).sign(signed)) + b"\n")
    return path


def signature_of(root: Path) -> str | None:
    """The content of `manifest.sig`, at most MAX_CHARACTERS; None if there is no such file, or a symbolic link, which
    could name a secret of this machine."""
    path = root / SIGNATURE
    if path.is_symlink() or not path.is_file():
        return None
    with path.open(errors="replace") as stream:
        return stream.read(MAX_CHARACTERS).strip()


def is_signed(signature: str | None, signed: bytes, keys: Sequence[Ed25519PublicKey]) -> bool:
    """Whether the signature of these bytes was made with one of the keys."""
    try:
        content = base64.b64decode(signature or "", validate=True)
    except ValueError:
        return False
    return any(_is_made_by(key, content, signed) for key in keys)


def public_key(path: Path) -> Ed25519PublicKey:
    """An Ed25519 public key in PEM. Raises SigningKeyInvalid."""
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


def _is_made_by(key: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True
