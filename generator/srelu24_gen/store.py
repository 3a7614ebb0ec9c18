"""The folder of built kernels: ``<name>-<key[:16]>/{kernel.cu, kernel.cubin, meta.json, compile.log}``.

An entry is written aside, flushed to disk and published by one rename, so a reader sees all of it or
nothing. What does not match its own digests is a miss. A folder that cannot be written costs a warning,
never the build; a folder that others can write is refused before anything is loaded from it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shlex
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from srelu24_gen import untrusted
from srelu24_gen.errors import CacheError
from srelu24_gen.kept_kernel import KeptKernel, KernelMeta, decode_meta
from srelu24_gen.paths import NOWHERE, cache_dir

LOCK_SECONDS = 60.0
"""A build takes a few seconds; who waits longer than this for another's build goes on without the lock."""
LEFTOVER_SECONDS = 3600.0
"""What a killed build leaves is removed when it is this old: no build writes for so long."""
_PAUSES = (0.0, 0.01, 0.05, 0.2, 0.5)
"""Seconds before each attempt to rename an entry into its place."""
_NAME = re.compile(r"[A-Za-z0-9_]{1,200}")
_KEY = re.compile(r"[0-9a-f]{64}")
_ENTRY = re.compile(r"[A-Za-z0-9_]+-[0-9a-f]{16}(\.failed)?")
_LEFTOVER = re.compile(r"\.tmp-\d+-[0-9a-f]{8}")
_TOOLCHAINS = "toolchains.json"
_warned: set[Path] = set()
_swept: set[Path] = set()


class BuildStore:
    """One folder of built kernels, by default :func:`srelu24_gen.paths.cache_dir`. Safe for many processes."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or cache_dir()).absolute()
        if self.folder == NOWHERE:
            _warned.add(NOWHERE)  # cache_dir() has said why

    def entry(self, key: str, name: str) -> Path:
        """Where that kernel is, if it is.

        Raises:
            CacheError: name or key is not of the form that those of kernels have, which are safe in a path.
        """
        if not _NAME.fullmatch(name) or not _KEY.fullmatch(key):
            raise CacheError(f"{name[:100]!r} with key {key[:100]!r} is no kernel, so the cache has no place for it")
        return self.folder / f"{name}-{key[:16]}"

    def load(self, key: str, name: str) -> tuple[bytes, KernelMeta] | None:
        """The intact cubin and its description, or None where there is none.

        Raises:
            CacheError: others may write to the folder.
        """
        self._require_private()
        found = _read(self.entry(key, name))
        return found if found and found[1].key == key else None

    def publish(self, meta: KernelMeta, *, source: str, cubin: bytes, log: str) -> Path | None:
        """Keep a kernel, replacing a damaged or another entry but never the very same one.

        Returns:
            Its folder, or None (after one warning) where the disk refuses.
        """
        kernel = KeptKernel(meta, source, cubin, log)
        target = self.entry(meta.key, meta.name)
        return target if self._place(kernel.files, target, keep=lambda: self._holds(kernel)) else None

    def keep_failure(self, key: str, name: str, *, source: str, log: str, command: str) -> Path | None:
        """Keep what a failed compilation read and printed in ``<entry>.failed``; returns as :meth:`publish`."""
        files = {"kernel.cu": source.encode(), "compile.log": log.encode(), "command.txt": f"{command}\n".encode()}
        target = self.entry(key, name).with_name(f"{self.entry(key, name).name}.failed")
        return target if self._place(files, target, keep=lambda: False) else None

    @contextlib.contextmanager
    def installing(self, kernels: Sequence[KeptKernel], toolchain: tuple[str, str]) -> Iterator[None]:
        """Keep the kernels of a bundle, and remember which NVRTC and CUTLASS made them: their keys depend on it.

        All or none: they are there in the body of the ``with`` statement, and what that raises takes them out again.

        Raises:
            CacheError: the folder cannot be written or trusted; it is as it was.
        """
        with contextlib.ExitStack() as cleanup, contextlib.ExitStack() as undo:
            try:
                self._make_folder()
                self._require_private()
                staged = []
                for kernel in kernels:
                    if not self._holds(kernel):
                        staged.append((kernel, temporary := self._temporary()))
                        cleanup.callback(_delete, temporary)
                        _write_folder(temporary, kernel.files)
                for kernel, temporary in staged:
                    target, aside = self.entry(kernel.meta.key, kernel.meta.name), self._temporary()
                    cleanup.callback(_delete, aside)
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(target, aside)
                        undo.callback(os.rename, aside, target)
                    self._rename_in(temporary, target, keep=lambda kernel=kernel: self._holds(kernel))  # type: ignore[misc]
                    if not temporary.exists():
                        undo.callback(self._remove, target)
                with self.lock("toolchains"):
                    known = self.packed_with()
                    self._write_toolchains([toolchain, *(each for each in known if each != toolchain)])
                    undo.callback(self._write_toolchains, known)
                _sync_folder(self.folder)
            except OSError as error:
                raise CacheError(
                    f"kernels cannot be kept in {self.folder} ({error}), so nothing was installed; free space or"
                    " permissions there, or set SRELU24_CACHE_DIR to another folder"
                ) from error
            yield
            undo.pop_all()

    def packed_with(self) -> list[tuple[str, str]]:
        """NVRTC and CUTLASS versions of the bundles that were loaded, the last one first.

        Raises:
            CacheError: others may write to the folder.
        """
        self._require_private()
        try:
            return untrusted.decode(untrusted.read(self.folder / _TOOLCHAINS), list[tuple[str, str]])
        except (OSError, untrusted.Undecodable):
            return []

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Held while a kernel is built, so that processes build it once; without it builds are only wasteful."""
        path = self.folder / ".locks" / f"{key[:16]}.lock"
        lock = FileLock(path, timeout=LOCK_SECONDS)
        try:
            self._make_folder()
            path.parent.mkdir(exist_ok=True)
            lock.acquire()
        except Timeout:
            pass
        except (OSError, NotImplementedError) as error:
            self.report_unwritable(error)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # what was done under the lock is done
                lock.release()

    def entries(self) -> list[KernelMeta]:
        """Every intact kernel, by name.

        Raises:
            CacheError: others may write to the folder.
        """
        self._require_private()
        found = [_read(path) for path in self._folders(_ENTRY)]
        return sorted((meta for _, meta in filter(None, found)), key=lambda meta: (meta.name, meta.key))

    def clear(self) -> int:
        """Remove every kernel, failure and leftover, and nothing else; answers how many kernels there were."""
        kernels = 0
        for path in (*self._folders(_ENTRY), *self._folders(_LEFTOVER)):
            kernels += (path / "kernel.cubin").is_file()
            _delete(path)
        shutil.rmtree(self.folder / ".locks", ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.folder / _TOOLCHAINS).unlink()
        return kernels

    def sweep(self) -> int:
        """Remove what no build will use again, and answer how many folders that were: what killed builds left, sources
        and logs of failed ones, and damaged entries."""
        self._require_private()
        doomed = [path for path in self._folders(_ENTRY) if _read(path) is None]
        for path in doomed:
            _delete(path)
        return len(doomed) + self._sweep_leftovers()

    def report_unwritable(self, cause: object) -> None:
        """Warn, once per folder and process, that kernels are not kept."""
        if self.folder not in _warned:
            _warned.add(self.folder)
            warnings.warn(
                f"compiled kernels cannot be kept in {self.folder} ({cause}), so every process builds its own;"
                " set SRELU24_CACHE_DIR to a folder you can write",
                RuntimeWarning,
                stacklevel=2,
            )

    def _holds(self, kernel: KeptKernel) -> bool:
        """Whether this very binary is there: how long it took to build may differ, and what else is told of it."""
        found = self.load(kernel.meta.key, kernel.meta.name)
        same = ("entry", "arch", "template", "family", "config", "abi", "cubin_sha256")
        return found is not None and all(getattr(found[1], name) == getattr(kernel.meta, name) for name in same)

    def _folders(self, form: re.Pattern[str]) -> list[Path]:
        """Folders of ours, by the form of their names; none where the cache cannot be read."""
        with contextlib.suppress(OSError):
            return [path for path in self.folder.iterdir() if form.fullmatch(path.name) and path.is_dir()]
        return []

    def _sweep_leftovers(self) -> int:
        count = 0
        for path in self._folders(_LEFTOVER):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                    _delete(path)
                    count += 1
        return count

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder not in _swept:  # once per process: a build that is killed is rare
            _swept.add(self.folder)
            self._sweep_leftovers()

    def _require_private(self) -> None:
        try:
            info = self.folder.stat()
        except OSError:
            return  # nothing can be loaded from it either
        if not stat.S_ISDIR(info.st_mode):
            return
        quoted = shlex.quote(str(self.folder))
        if info.st_mode & 0o022:
            raise CacheError(
                f"others may write to the kernel cache {self.folder} (mode {info.st_mode & 0o777:o}), so its kernels"
                f" cannot be trusted; run: chmod go-w {quoted}, or set SRELU24_CACHE_DIR to a folder of your own"
            )
        # Root and the owner of this very file decide what runs here anyway (image builds, mounted checkouts).
        if info.st_uid not in {os.geteuid(), 0, Path(__file__).stat().st_uid}:
            raise CacheError(
                f"the kernel cache {self.folder} belongs to another user (uid {info.st_uid}), so its kernels cannot"
                " be trusted; set SRELU24_CACHE_DIR to a folder of your own"
            )

    def _place(self, files: Mapping[str, bytes], target: Path, keep: Callable[[], bool]) -> bool:
        """Write files aside, then rename to ``target``; what is there stays when ``keep()`` says so."""
        temporary = self._temporary()
        try:
            self._make_folder()
            _write_folder(temporary, files)
            self._rename_in(temporary, target, keep)
            _sync_folder(self.folder)
        except OSError as error:
            self.report_unwritable(error)
            return False
        finally:
            _delete(temporary)  # gone already after the rename
        return True

    def _rename_in(self, temporary: Path, target: Path, keep: Callable[[], bool]) -> None:
        """Rename to ``target``, in place of what is there unless ``keep()``. A network disk may say that something is
        there and not show it yet: after a few attempts that is an OSError."""
        for pause in _PAUSES:
            time.sleep(pause)
            try:
                return os.rename(temporary, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            if keep():
                return None  # another process was first
            self._remove(target)
        raise OSError(errno.EEXIST, f"what is in the place of {target.name} can be neither read nor removed")

    def _remove(self, path: Path) -> None:
        """Out of sight by one rename, so that nobody reads half of it, then deleted."""
        aside = self._temporary()
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(path, aside)
        _delete(aside)

    def _write_toolchains(self, known: list[tuple[str, str]]) -> None:
        temporary = self._temporary()
        try:
            _write_synced(temporary, msgspec.json.encode(known))
            os.replace(temporary, self.folder / _TOOLCHAINS)
        finally:
            _delete(temporary)

    def _temporary(self) -> Path:
        return self.folder / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"


def _read(folder: Path) -> tuple[bytes, KernelMeta] | None:
    try:
        meta = decode_meta(untrusted.read(folder / "meta.json"))
        cubin = untrusted.read(folder / "kernel.cubin")
    except (OSError, untrusted.Undecodable):
        return None
    named = folder.name == f"{meta.name}-{meta.key[:16]}"
    intact = len(cubin) == meta.cubin_bytes and hashlib.sha256(cubin).hexdigest() == meta.cubin_sha256
    return (cubin, meta) if named and intact else None


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(mode=0o755)
    for name, content in files.items():
        _write_synced(folder / name, content)
    _sync_folder(folder)


def _delete(path: Path) -> None:
    """A folder or a file, as far as the disk lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _write_synced(path: Path, content: bytes) -> None:
    # Not writable by the group, whatever the umask: the folder's check speaks for its files.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
