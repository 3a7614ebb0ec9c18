"""The folder of built kernels: ``<name>-<key[:16]>/{kernel.cu, kernel.cubin, meta.json, compile.log}``.

An entry is written aside, flushed to disk and published by one rename, so a reader sees all of it or
nothing. What does not match its own digest is a miss. A folder that cannot be written costs a warning,
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
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from srelu24_gen.errors import CacheError
from srelu24_gen.paths import cache_dir

LOCK_SECONDS = 60.0
"""A build takes a few seconds; who waits longer than this for another's build goes on without the lock."""
_OURS = re.compile(r".+-[0-9a-f]{16}(\.failed)?|\.tmp-\d+-[0-9a-f]{8}")
_TOOLCHAIN = "bundle.json"
_warned: set[Path] = set()


class KernelMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about one binary; ``meta.json``. Sizes in bytes, per thread where not said otherwise."""

    name: str
    key: str
    """SHA-256 of all that went into the binary."""
    entry: str
    """Symbol of the kernel."""
    arch: str
    template: str
    family: dict[str, str | bool | None]
    config: dict[str, str | int | bool]
    """Fields of the KernelConfig, runtime fields at their defaults."""
    registers: int
    stack_bytes: int
    spill_bytes: int
    """Spill stores plus spill loads."""
    static_smem: int
    """Per block; dynamic shared memory comes on top."""
    warnings: list[str]
    """What ptxas said about lost performance, for example serialised wgmma (C75xx)."""
    compile_seconds: float
    nvrtc_version: str
    cutlass_version: str
    source_digest: str
    """SHA-256 of kernel.cu."""
    abi: int
    cubin_bytes: int
    """Size of the whole file, with cubin_sha256 the proof that it is intact."""
    cubin_sha256: str

    @property
    def fault(self) -> str:
        """Why the kernel is not worth running, in words; empty where nothing is wrong with it.

        A kernel that spills registers or whose MMAs ptxas serialised computes what it should, several times slower.
        """
        if self.spill_bytes or self.stack_bytes:
            return f"it spills registers: {self.spill_bytes} bytes, with {self.stack_bytes} bytes of stack"
        serialised = [warning for warning in self.warnings if "wgmma" in warning]
        return f"ptxas serialised its MMAs: {serialised[0]}" if serialised else ""


class BuildStore:
    """One folder of built kernels, by default :func:`srelu24_gen.paths.cache_dir`. Safe for many processes."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or cache_dir()).absolute()

    def entry(self, key: str, name: str) -> Path:
        """Where that kernel is, if it is."""
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
        """Keep a kernel, replacing a damaged entry but never an intact one.

        Returns:
            Its folder, or None (after one warning) where the disk refuses.
        """
        files = {
            "kernel.cu": source.encode(),
            "kernel.cubin": cubin,
            "compile.log": log.encode(),
            "meta.json": msgspec.json.format(msgspec.json.encode(meta)) + b"\n",
        }
        target = self.entry(meta.key, meta.name)
        return target if self._place(files, target, keep=lambda: self.load(meta.key, meta.name) is not None) else None

    def keep_failure(self, key: str, name: str, *, source: str, log: str, command: str) -> Path | None:
        """Keep what a failed compilation read and printed in ``<entry>.failed``; returns as :meth:`publish`."""
        files = {"kernel.cu": source.encode(), "compile.log": log.encode(), "command.txt": f"{command}\n".encode()}
        target = self.entry(key, name).with_name(f"{self.entry(key, name).name}.failed")
        return target if self._place(files, target, keep=lambda: False) else None

    def keep_toolchain(self, nvrtc_version: str, cutlass_version: str) -> None:
        """Remember with which versions the kernels of a bundle were made: their keys depend on them."""
        path = self.folder / _TOOLCHAIN
        try:
            self._make_folder()
            temporary = self._temporary()
            _write_synced(temporary, msgspec.json.encode([nvrtc_version, cutlass_version]))
            os.replace(temporary, path)
        except OSError as error:
            self.report_unwritable(error)

    def packed_with(self) -> tuple[str, str] | None:
        """NVRTC and CUTLASS version of the last bundle that was loaded, or None.

        Raises:
            CacheError: others may write to the folder.
        """
        self._require_private()
        try:
            return msgspec.json.decode((self.folder / _TOOLCHAIN).read_bytes(), type=tuple[str, str])
        except (OSError, msgspec.DecodeError):
            return None

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
            lock.release()

    def entries(self) -> list[KernelMeta]:
        """Every intact kernel, by name.

        Raises:
            CacheError: others may write to the folder.
        """
        self._require_private()
        found = [_read(path) for path in self._our_folders()]
        return sorted((meta for _, meta in filter(None, found)), key=lambda meta: (meta.name, meta.key))

    def clear(self) -> int:
        """Remove every kernel, failure and leftover, and nothing else; answers how many kernels there were."""
        kernels = 0
        for path in self._our_folders():
            kernels += (path / "kernel.cubin").is_file()
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.folder / ".locks", ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.folder / _TOOLCHAIN).unlink()
        return kernels

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

    def _our_folders(self) -> list[Path]:
        """Entries, failures and unfinished entries, by the form of their names."""
        with contextlib.suppress(OSError):
            return [path for path in self.folder.iterdir() if _OURS.fullmatch(path.name) and path.is_dir()]
        return []

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _require_private(self) -> None:
        try:
            info = self.folder.stat()
        except OSError:
            return  # nothing can be loaded from it either
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
            temporary.mkdir(mode=0o755)
            for name, content in files.items():
                _write_synced(temporary / name, content)
            _sync_folder(temporary)
            while True:
                try:
                    os.rename(temporary, target)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                    if keep():
                        return True  # another process was first
                    self._remove(target)
                else:
                    _sync_folder(self.folder)
                    return True
        except OSError as error:
            self.report_unwritable(error)
            return False
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already after the rename

    def _remove(self, path: Path) -> None:
        """Out of sight by one rename, so that nobody reads half of it, then deleted."""
        aside = self._temporary()
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(path, aside)
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)

    def _temporary(self) -> Path:
        return self.folder / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"


def _read(folder: Path) -> tuple[bytes, KernelMeta] | None:
    try:
        meta = msgspec.json.decode((folder / "meta.json").read_bytes(), type=KernelMeta)
        cubin = (folder / "kernel.cubin").read_bytes()
    except (OSError, msgspec.MsgspecError):
        return None
    intact = len(cubin) == meta.cubin_bytes and hashlib.sha256(cubin).hexdigest() == meta.cubin_sha256
    return (cubin, meta) if intact else None


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
