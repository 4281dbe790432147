"""Tensors out of files from somebody else: read as data, never as code."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from metasft.files.untrusted import reason

_DIRECTORY_BIT = 0x10  # of the attributes that MS-DOS kept


def read_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote, as tensors and plain values: no object in it is built, no code of it runs.

    Raises:
        ValueError: it is no such file, is damaged (the checksum of every part is compared), or holds other objects.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                if part.compress_type != zipfile.ZIP_STORED:  # a few kilobytes could unpack to any size
                    raise ValueError(f"{part.filename} in it is compressed, which torch.save does not do")
                if part.external_attr & _DIRECTORY_BIT:  # torch would read nothing, and take what is in memory for it
                    raise ValueError(f"{part.filename} in it is marked as a folder, which torch.save does not do")
            damaged = archive.testzip()  # torch itself does not compare the checksums
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes make the two readers stumble over
        raise ValueError(reason(error)) from error
