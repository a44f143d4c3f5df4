"""Archives and compressed files are not unpacked: what is inside may be of any size and any name."""

from __future__ import annotations

from pathlib import Path

from mlmx.config import RequestError

SUFFIXES = (
    *(".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".7z", ".rar"),
    *(".lz4", ".br", ".z", ".cab", ".jar"),
)
# What the files begin with, so that another name does not bring them in.
SIGNATURES = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "a zip archive",
    b"PK\x07\x08": "a zip archive",
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
}
BZIP2_BLOCK = b"\x31\x41\x59\x26\x53\x59"  # follows BZh and a digit; a text may well begin with BZh
TAR_MAGIC_AT, TAR_MAGIC = 257, b"ustar"
READ_BYTES = 512


def refuse_archive(path: Path) -> None:
    """Refuse a file that is an archive or compressed, by its name or by its first bytes.

    Raises:
        RequestError: it is one.
    """
    kind = "an archive" if path.suffix.lower() in SUFFIXES else kind_of(path)
    if kind is not None:
        raise RequestError(f"dataset.path={path}: is {kind}, and those are not unpacked; unpack it and give the files")


def kind_of(path: Path) -> str | None:
    """``a zip archive`` and the like by the first bytes, or None."""
    try:
        with path.open("rb") as file:
            start = file.read(READ_BYTES)
    except OSError:
        return None  # whoever reads it says why it cannot be read
    for signature, kind in SIGNATURES.items():
        if start.startswith(signature) and (signature != b"BZh" or start[4:10] == BZIP2_BLOCK):
            return kind
    return "a tar archive" if start[TAR_MAGIC_AT:].startswith(TAR_MAGIC) else None
