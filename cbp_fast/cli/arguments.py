"""Arguments that the subcommands share, and whether their files can be written, before minutes are spent on them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..programs import ignored

# of pictures
FORMATS = (".png", ".pdf", ".svg")


def count(most: int | None = None) -> Callable[[str], int]:
    """The type of a whole number from 1 on, up to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < 1 or (most is not None and int(text) > most):
            at_most = "" if most is None else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1{at_most}")
        return int(text)

    return parse


def seconds(text: str) -> float:
    """The type of a duration."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return number


def device(text: str) -> str:
    """The type of a device, which has to be there."""
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal() or (kind == "cpu" and index):
        raise argparse.ArgumentTypeError(f"{text!r} must be cpu or cuda")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    return text


def file(text: str) -> Path:
    """The type of a file to write."""
    if not text or text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"{text!r} must be the name of a file")
    return Path(text)


def unwritable(files: Iterable[tuple[str, Path]], pictures: Iterable[tuple[str, Path]] = ()) -> str | None:
    """What is wrong with the files to write, as (option, path), or None. They and their folders are as before.

    Args:
        pictures: files whose folders will be made.
    """
    files, pictures = list(files), list(pictures)
    seen: dict[object, str] = {}
    for option, path in [*files, *pictures]:
        try:
            with ignored():
                why = _unwritable(path, (option, path) in pictures)
            there = path.stat() if path.exists() else None
        except OSError as error:
            why, there = f"cannot be written: {error.strerror or error}", None
        if why is not None:
            return f"{option}: {path} {why}"
        # one file has many names
        name: object = (there.st_dev, there.st_ino) if there else os.path.realpath(path)
        if name in seen and (there is None or path.is_file()):
            return f"{seen[name]} and {option} are both {path}"
        seen[name] = option
    return None


def _unwritable(path: Path, makes_folder: bool) -> str | None:
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.is_dir():
        return "is a folder, must be a file"
    if path.exists() and not path.is_file():
        # a terminal or a pipe, which may wait when it is opened
        return None if os.access(path, os.W_OK) else "cannot be written"
    if not path.parent.is_dir() and not makes_folder:
        return f"cannot be written: there is no folder {path.parent}"
    missing = [folder for folder in path.parents if not folder.exists()]
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    finally:
        for folder in reversed(made):
            folder.rmdir()
    return None
