"""A directory of a simulated disk, as a tree of its own: what befalls the disk befalls it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pyarrow as pa

from marble.env import AppendFile, Files


class Subtree:
    """A `marble.env.Files`: the directory `root` of `files`."""

    def __init__(self, files: Files, root: str) -> None:
        self._files = files
        self._root = root

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def make_directory(self, path: str) -> None:
        self._files.make_directory(self._path(path))

    def list(self, path: str) -> Sequence[str]:
        return self._files.list(self._path(path))

    def exists(self, path: str) -> bool:
        return self._files.exists(self._path(path))

    def size(self, path: str) -> int:
        return self._files.size(self._path(path))

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        return self._files.read(self._path(path), offset, size)

    def map(self, path: str) -> pa.Buffer:
        return self._files.map(self._path(path))

    def create(self, path: str) -> AppendFile:
        return self._files.create(self._path(path))

    def open_append(self, path: str) -> AppendFile:
        return self._files.open_append(self._path(path))

    def reuse(self, path: str) -> AppendFile:
        return self._files.reuse(self._path(path))

    def overwrite(self, path: str, data: bytes) -> None:
        self._files.overwrite(self._path(path), data)

    def truncate(self, path: str, size: int) -> None:
        self._files.truncate(self._path(path), size)

    def rename(self, source: str, target: str) -> None:
        self._files.rename(self._path(source), self._path(target))

    def set_aside(self, source: str, target: str) -> bool:
        return self._files.set_aside(self._path(source), self._path(target))

    def link(self, source: str, target: str) -> None:
        self._files.link(self._path(source), self._path(target))

    def remove(self, path: str) -> None:
        self._files.remove(self._path(path))

    def remove_tree(self, path: str) -> None:
        self._files.remove_tree(self._path(path))

    def sync_directory(self, path: str) -> None:
        self._files.sync_directory(self._path(path))

    def below(self, path: str) -> Subtree:
        return Subtree(self._files, self._path(path))

    def lock(self, path: str) -> contextlib.AbstractContextManager[None]:
        return self._files.lock(self._path(path))

    def describe(self, path: str) -> str:
        return self._files.describe(self._path(path))
