"""The signature of a folder with a key of the lab's own: offline, in OpenSSF's model signing format (`model.sig`).

It holds the sha256 of every file, the chain among them, so its head is signed. Anyone checks it with the public key and
the package `model-signing` alone; git's own files and an empty folder are not in it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
from pathlib import Path

from aurora_train.errors import MissingExtra, UserError
from aurora_train.lineage import chain

SIGNATURE = "model.sig"
_HERE = (SIGNATURE, ".lock", ".trash")  # what belongs to this machine or to the signature itself
_GIT = (".git", ".gitattributes", ".github", ".gitignore")  # never signed by that format
_MAKE = "aurora lineage --new-key lab.pem"


def new_key(path: Path) -> Path:
    """Write a private key (P-256, PEM, readable by its owner alone) and its public key beside it; the latter's path."""
    _package("--new-key")
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    public = path.with_suffix(".pub")
    for one in (path, public):
        if one.exists():
            raise UserError("this file exists, and a key is never replaced", where=str(one), hint="name another one")
    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    open_one = key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
        public.write_bytes(open_one)
    except OSError as error:
        raise UserError(f"cannot write the key: {error.strerror}", where=str(path)) from error
    return public


def identity(key: Path) -> str:
    """sha256 hex of the public key that belongs to a private one, as signatures name it. UserError for another."""
    _package("--sign")
    from cryptography.hazmat.primitives import serialization as forms

    try:
        public = forms.load_pem_private_key(key.read_bytes(), None).public_key()
        curve = public.curve.name
    except OSError as error:
        raise UserError(f"cannot read the key: {error.strerror}", where=str(key), hint=_MAKE) from error
    except (ValueError, TypeError, AttributeError) as error:
        why = "it is encrypted" if isinstance(error, TypeError) else "it is not a private key on an elliptic curve, PEM"
        raise UserError("this key cannot sign", where=str(key), why=why, hint=f"`{_MAKE}` makes one") from error
    if curve not in ("secp256r1", "secp384r1", "secp521r1"):
        raise UserError(f"this key cannot sign: its curve is {curve}", where=str(key), hint=f"`{_MAKE}` makes one")
    pem = public.public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def sign(folder: Path, key: Path) -> str:
    """Put the key's identity on record as the head of a folder's chain, and sign all of the folder. Returns the head.

    The caller has brought the chain up to date. Raises UserError for a key that cannot sign and for a link in the
    folder, which the format does not follow.
    """
    package, who = _package("--sign"), identity(key)
    path = folder / SIGNATURE
    path.unlink(missing_ok=True)
    link = next((one for one in sorted(folder.rglob("*")) if one.is_symlink()), None)
    if link is not None:
        raise UserError("a link cannot be signed", where=str(link), hint="put the file itself in its place")
    head = chain.add(folder / chain.NAME, [{"kind": "sign", "key_sha256": who}])
    left_out = package.hashing.Config().set_ignored_paths(paths=_HERE)
    try:
        signer = package.signing.Config().use_elliptic_key_signer(private_key=key)
        signer.set_hashing_config(left_out).sign(folder, path)
    except OSError as error:
        raise UserError(f"cannot sign: {error.strerror}", where=str(path)) from error
    return head.sha256


def faults(folder: Path, key: Path) -> list[str]:
    """What differs between a folder and what the holder of a key signed; a line that names each file.

    `key`: the public one. Raises UserError for a key that cannot be read, and MissingExtra without the package.
    """
    package, path = _package("--verify --key"), folder / SIGNATURE
    try:
        verifier = package.verifying.Config().use_elliptic_key_verifier(public_key=key)
    except OSError as error:
        raise UserError(f"cannot read the key: {error.strerror}", where=str(key)) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError("this is no public key of an elliptic curve, PEM", where=str(key),
                        hint="the .pub file of whoever signed") from error  # fmt: skip
    if not path.is_file():
        return [f"{SIGNATURE} is missing: nothing here is signed"]
    said, links = io.StringIO(), [one for one in folder.rglob("*") if one.is_symlink()]
    try:
        with contextlib.redirect_stdout(said):
            verifier.verify(folder, path)
    except Exception as error:  # of the signature, of its form, or of the files: the format has no error of its own
        found = _named(folder, path)
        found += [f"{one.relative_to(folder).as_posix()} is a link, which was never signed" for one in links]
        if not str(error).startswith("Signature mismatch") and not links:
            found.insert(0, f"{SIGNATURE} is not the signature that the holder of {key.name} made"
                         + (f" ({line})" if (line := str(error).strip().split("\n")[0][:100]) else ""))  # fmt: skip
        return found or [f"{SIGNATURE} does not fit this folder: {str(error)[:200]}"]
    return []


def signed_files(path: Path) -> dict[str, str] | None:
    """sha256 of each file by name, as a signature claims them; None if it cannot be read."""
    try:
        statement = json.loads(base64.b64decode(json.loads(path.read_text())["dsseEnvelope"]["payload"]))
        return {one["name"]: one["digest"] for one in statement["predicate"]["resources"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _named(folder: Path, path: Path) -> list[str]:
    """How the files of a folder differ from what its signature claims, a line each."""
    claimed = signed_files(path)
    if claimed is None:
        return []
    now = {}
    for one in sorted(folder.rglob("*")):
        name = one.relative_to(folder).as_posix()
        if one.is_file() and not one.is_symlink() and name.split("/")[0] not in (*_HERE, *_GIT):
            now[name] = chain.file_digest(one)
    return [f"{name} is missing, and was signed" for name in claimed if name not in now] + [
        f"{name} is not signed: it was added" for name in now if name not in claimed] + [
        f"{name} is not what was signed: it was changed" for name in now if claimed.get(name, now[name]) != now[name]]


def _package(needed_for: str):
    try:
        import model_signing
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:  # it uses OpenSSL's Python package without asking for it
        raise MissingExtra(getattr(error, "name", None) or "model-signing", "sign", needed_for) from error
    return model_signing
