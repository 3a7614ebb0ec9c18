"""The build store: all or nothing on disk, damage is a miss, a bad folder costs a warning, an unsafe one is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

from srelu24_gen import store as store_module
from srelu24_gen.errors import CacheError
from srelu24_gen.kept_kernel import KeptKernel, KernelMeta, encode_meta
from srelu24_gen.spec import DType, Family, KernelConfig, Op
from srelu24_gen.store import BuildStore

CUBIN = b"\x7fELF" + bytes(range(256))
KEY = hashlib.sha256(b"a kernel").hexdigest()
NAME = "gemm_bf16_sm_90a"


def meta_of(cubin: bytes = CUBIN, key: str = KEY) -> KernelMeta:
    return KernelMeta(
        name=NAME,
        key=key,
        entry="srelu24_kernel",
        arch="sm_90a",
        template="sm90/gemm.cu.jinja",
        family={k: v if isinstance(v, bool) else str(v) for k, v in dataclasses.asdict(FAMILY).items()},
        config=KernelConfig().to_dict(),
        registers=168,
        stack_bytes=0,
        spill_bytes=0,
        static_smem=0,
        warnings=["(C7511) said « so »"],
        compile_seconds=1.25,
        nvrtc_version="13.0.88",
        cutlass_version="4.2.0",
        source_digest="0" * 64,
        abi=1,
        cubin_bytes=len(cubin),
        cubin_sha256=hashlib.sha256(cubin).hexdigest(),
    )


FAMILY = Family(Op.GEMM, DType.BF16)


def publish(store: BuildStore, cubin: bytes = CUBIN, key: str = KEY) -> Path | None:
    return store.publish(meta_of(cubin, key), source="// source ü\n", cubin=cubin, log="log\n")


@pytest.fixture
def store(tmp_path: Path) -> BuildStore:
    return BuildStore(tmp_path / "cache")


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_published_is_loaded(store: BuildStore) -> None:
    assert store.load(KEY, NAME) is None
    folder = publish(store)
    assert folder == store.folder / f"{NAME}-{KEY[:16]}"
    assert store.load(KEY, NAME) == (CUBIN, meta_of())
    assert files_below(store.folder) == [
        f"{folder.name}/{name}" for name in ("compile.log", "kernel.cu", "kernel.cubin", "meta.json")
    ]
    assert (folder / "kernel.cu").read_text(encoding="utf-8") == "// source ü\n"
    assert store.entries() == [meta_of()]


def test_a_key_with_the_same_first_digits_is_another_kernel(store: BuildStore) -> None:
    publish(store)
    assert store.load(KEY[:16] + "0" * 48, NAME) is None


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bit": lambda f: (f / "kernel.cubin").write_bytes(bytes([CUBIN[0] ^ 1]) + CUBIN[1:]),
    "truncated cubin": lambda f: (f / "kernel.cubin").write_bytes(CUBIN[:-1]),
    "empty cubin": lambda f: (f / "kernel.cubin").write_bytes(b""),
    "no cubin": lambda f: (f / "kernel.cubin").unlink(),
    "truncated meta": lambda f: (f / "meta.json").write_bytes((f / "meta.json").read_bytes()[:-40]),
    "empty meta": lambda f: (f / "meta.json").write_bytes(b""),
    "binary meta": lambda f: (f / "meta.json").write_bytes(b"\xff\xfe{"),
    "foreign meta": lambda f: (f / "meta.json").write_bytes(b'{"name": "x"}'),
    "meta of wrong types": lambda f: (f / "meta.json").write_bytes(
        (f / "meta.json").read_bytes().replace(b'"registers": 168', b'"registers": "many"')
    ),
    "meta is a folder": lambda f: ((f / "meta.json").unlink(), (f / "meta.json").mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_a_miss_and_is_replaced(store: BuildStore, damage: str) -> None:
    folder = publish(store)
    assert folder
    DAMAGE[damage](folder)
    assert store.load(KEY, NAME) is None
    assert store.entries() == []
    assert publish(store) == folder
    assert store.load(KEY, NAME) == (CUBIN, meta_of())
    assert list(store.folder.iterdir()) == [folder], "nothing of the damaged entry is left"


def test_a_file_in_the_place_of_an_entry_is_replaced(store: BuildStore) -> None:
    store.folder.mkdir(mode=0o700)
    store.entry(KEY, NAME).write_text("?")
    assert store.load(KEY, NAME) is None
    assert publish(store)
    assert store.load(KEY, NAME)


def test_the_loser_of_a_race_drops_its_copy(store: BuildStore) -> None:
    folder = publish(store)
    assert folder
    inode = (folder / "kernel.cubin").stat().st_ino
    assert publish(store) == folder
    assert (folder / "kernel.cubin").stat().st_ino == inode, "the first copy stays"
    assert list(store.folder.iterdir()) == [folder]


def test_concurrent_publishers_and_readers_see_whole_entries_only(store: BuildStore) -> None:
    stop, seen, errors = threading.Event(), [], []

    def read() -> None:
        while not stop.is_set():
            found = store.load(KEY, NAME)
            if found:
                seen.append(found)
                if found != (CUBIN, meta_of()):
                    errors.append(found)

    def write() -> None:
        for _ in range(20):
            if publish(store) is None:
                errors.append(None)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader.start()
        for thread in writers:
            thread.start()
        for thread in writers:
            thread.join()
        stop.set()
        reader.join()
    assert seen
    assert not errors
    assert [path.name for path in store.folder.iterdir()] == [store.entry(KEY, NAME).name]


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_an_interrupt_leaves_no_half_entry(store: BuildStore, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(store_module, "_write_synced", interrupt)
        else:
            patch.setattr(store_module.os, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            publish(store)
    assert list(store.folder.iterdir()) == []
    assert publish(store)


@contextlib.contextmanager
def one_warning(store: BuildStore, cause: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert len(caught) == 1
    text = str(caught[0].message)
    assert str(store.folder) in text
    assert "SRELU24_CACHE_DIR" in text
    assert cause in text


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("call", ["mkdir", "write", "fsync", "rename"])
def test_a_disk_that_refuses_costs_one_warning(
    store: BuildStore, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    with one_warning(store, os.strerror(code)), monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(store_module, "_write_synced", refuse)
        else:
            patch.setattr(store_module.os, call, refuse)
        for _ in range(3):
            with store.lock(KEY):
                assert publish(store) is None
            assert store.keep_failure(KEY, NAME, source="", log="", command="") is None
    assert store.load(KEY, NAME) is None
    left = {path.name for path in store.folder.iterdir()} if store.folder.exists() else set()
    assert left <= {".locks"}
    assert publish(store), "it works again once the disk does"


def test_a_file_in_the_place_of_the_folder_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    store = BuildStore(tmp_path / "cache")
    with one_warning(store, "File exists"):
        assert store.load(KEY, NAME) is None
        with store.lock(KEY):
            assert publish(store) is None
    assert store.entries() == []
    assert store.clear() == 0
    assert (tmp_path / "cache").read_text() == "in the way"


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_a_folder_others_may_write_to_is_refused_before_loading(store: BuildStore, mode: int) -> None:
    publish(store)
    store.folder.chmod(mode)
    for use in (lambda: store.load(KEY, NAME), store.entries):
        with pytest.raises(CacheError, match=rf"others may write.*chmod go-w {store.folder}"):
            use()
    store.folder.chmod(mode & ~0o1022)
    assert store.load(KEY, NAME)


def test_a_folder_of_another_user_is_refused(store: BuildStore, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store)
    owner = store.folder.stat().st_uid
    if os.geteuid() == 0:
        os.chown(store.folder, 54321, -1)
    else:
        monkeypatch.setattr(store_module.os, "geteuid", lambda: owner + 1)
        monkeypatch.setattr(store_module, "__file__", "/")
    with pytest.raises(CacheError, match=r"belongs to another user \(uid \d+\).*SRELU24_CACHE_DIR"):
        store.load(KEY, NAME)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_what_the_store_creates_is_private_whatever_the_umask(store: BuildStore, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = publish(store)
    finally:
        os.umask(before)
    assert folder
    for path in (store.folder, folder, *folder.iterdir()):
        assert path.stat().st_mode & 0o022 == 0, path
    assert store.load(KEY, NAME)


def test_a_failure_is_kept_and_the_latest_replaces_it(store: BuildStore) -> None:
    for attempt in ("first", "second"):
        folder = store.keep_failure(KEY, NAME, source="int", log=f"{attempt} log", command="nvrtc -x")
    assert folder
    assert folder.name == f"{NAME}-{KEY[:16]}.failed"
    assert (folder / "kernel.cu").read_text() == "int"
    assert (folder / "compile.log").read_text() == "second log"
    assert (folder / "command.txt").read_text() == "nvrtc -x\n"
    assert list(store.folder.iterdir()) == [folder]
    assert store.load(KEY, NAME) is None
    assert store.entries() == []


def test_clear_removes_kernels_and_nothing_else(store: BuildStore) -> None:
    publish(store)
    publish(store, key="f" * 64)
    store.keep_failure("e" * 64, NAME, source="", log="", command="")
    with store.lock(KEY):
        pass
    (store.folder / ".tmp-123-0123abcd").mkdir()
    foreign = ["README.md", ".gitignore", "thesis/kernel.cubin", "photos-2024/x.jpg"]
    for name in foreign:
        (store.folder / name).parent.mkdir(exist_ok=True)
        (store.folder / name).write_text("mine")
    assert store.clear() == 2
    assert files_below(store.folder) == sorted(foreign)
    assert store.clear() == 0


def test_the_lock_excludes_threads_and_a_stuck_holder_is_not_waited_for(
    store: BuildStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most, guard = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with store.lock(KEY):
                with guard:
                    inside += 1
                    most = max(most, inside)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.1)
    with store.lock(KEY), store.lock(KEY), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert publish(store)


def test_meta_is_readable_json(store: BuildStore) -> None:
    folder = publish(store)
    assert folder
    assert msgspec.json.decode((folder / "meta.json").read_bytes())["config"]["tile_m"] == KernelConfig().tile_m


# --- what is there is believed only as far as it can be proven


def test_no_flip_of_a_description_is_served(store: BuildStore) -> None:
    folder = publish(store)
    assert folder
    text = (folder / "meta.json").read_bytes()
    for place in range(len(text)):
        flipped = bytearray(text)
        flipped[place] ^= 1 << place % 8
        (folder / "meta.json").write_bytes(flipped)
        assert store.load(KEY, NAME) is None, (place, bytes(flipped[place - 9 : place + 9]))
    (folder / "meta.json").write_bytes(text)
    assert store.load(KEY, NAME)


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", "", ".tmp-1-01234567", "a\0b", "x" * 201, "a b"])
def test_a_name_is_never_a_path(store: BuildStore, tmp_path: Path, name: str) -> None:
    meta = msgspec.structs.replace(meta_of(), name=name)
    with pytest.raises(CacheError, match="is no kernel"):
        store.publish(meta, source="", cubin=CUBIN, log="")
    with pytest.raises(CacheError, match="is no kernel"):
        store.load("../" + KEY[3:], NAME)
    assert list(tmp_path.iterdir()) == []


def test_an_entry_in_another_ones_place_is_a_miss(store: BuildStore) -> None:
    folder = publish(store)
    assert folder
    other = "f" * 64
    folder.rename(store.entry(other, NAME))
    assert store.load(other, NAME) is None
    assert store.entries() == []


def test_a_pipe_in_an_entry_is_a_miss_and_nothing_waits(store: BuildStore) -> None:
    folder = publish(store)
    assert folder
    for name in ("meta.json", "kernel.cubin"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert store.load(KEY, NAME) is None
        publish(store)
        assert store.load(KEY, NAME)


def test_another_binary_in_the_place_of_one_is_replaced(store: BuildStore) -> None:
    publish(store, cubin=b"\x7fELF of another")
    publish(store)
    assert store.load(KEY, NAME) == (CUBIN, meta_of())


# --- disks that are odd


def test_a_winner_that_is_not_visible_is_not_waited_for(store: BuildStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk may answer a rename with "exists" before it shows what exists."""
    asked: list[float] = []
    rename = os.rename

    def exists(source: Path, target: Path) -> None:
        if ".tmp-" in Path(target).name:
            raise FileNotFoundError
        asked.append(0)
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    monkeypatch.setattr(store_module.os, "rename", exists)
    monkeypatch.setattr(store_module.time, "sleep", asked.append)
    with one_warning(store, "neither read nor removed"):
        assert publish(store) is None
    assert asked.count(0) - 1 == 5, "attempts; one of the pauses is nothing"
    assert 0 < sum(asked) < 2
    assert list(store.folder.iterdir()) == []
    monkeypatch.setattr(store_module.os, "rename", rename)
    assert publish(store)


def test_an_unlock_that_fails_loses_nothing(store: BuildStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(store_module.FileLock, "release", refuse)
        with store.lock(KEY):
            folder = publish(store)
    assert folder
    assert store.load(KEY, NAME)


def age(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_what_killed_builds_left_is_swept_when_it_is_old(store: BuildStore) -> None:
    publish(store)
    old, young, foreign = (store.folder / name for name in (".tmp-1-01234567", ".tmp-2-01234567", ".tmp-other"))
    for path in (old, young, foreign):
        path.mkdir()
        (path / "kernel.cu").touch()
    age(old, store_module.LEFTOVER_SECONDS + 60)
    age(foreign, store_module.LEFTOVER_SECONDS + 60)
    store_module._swept.discard(store.folder)
    publish(BuildStore(store.folder), key="e" * 64)  # as the first build of another process
    assert sorted(path.name for path in store.folder.glob(".tmp*")) == [young.name, foreign.name]


def test_sweep_takes_leftovers_failures_and_damage_and_leaves_kernels(store: BuildStore) -> None:
    whole, damaged = publish(store), publish(store, key="e" * 64)
    assert whole
    assert damaged
    (damaged / "kernel.cubin").write_bytes(b"")
    store.keep_failure("d" * 64, NAME, source="", log="", command="")
    (store.folder / "mine").mkdir()
    left = store.folder / ".tmp-1-01234567"
    left.mkdir()
    age(left, store_module.LEFTOVER_SECONDS + 60)
    assert store.sweep() == 3
    assert sorted(path.name for path in store.folder.iterdir()) == sorted([whole.name, "mine"])
    assert store.sweep() == 0


# --- bundles are installed whole


def kernels(count: int) -> list[KeptKernel]:
    return [KeptKernel(meta_of(key=f"{i:064x}"[::-1]), "// source\n", CUBIN, "log") for i in range(count)]


def test_what_is_installed_is_there_and_so_are_the_bundles_before(store: BuildStore) -> None:
    with store.installing(kernels(3), ("13.0.88", "4.2.0")):
        assert len(store.entries()) == 3
    with store.installing(kernels(4), ("13.5.37", "4.2.0")):
        pass
    with store.installing(kernels(1), ("13.0.88", "4.2.0")):
        pass
    assert len(store.entries()) == 4
    assert store.packed_with() == [("13.0.88", "4.2.0"), ("13.5.37", "4.2.0")]


def snapshot(store: BuildStore) -> dict[str, bytes]:
    return {name: (store.folder / name).read_bytes() for name in files_below(store.folder) if ".locks" not in name}


@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "rename", "replace"])
def test_a_disk_that_refuses_at_any_moment_installs_nothing(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refusals = getattr(os, call), 0
    for allowed in range(60):
        store, left = BuildStore(tmp_path / str(allowed)), allowed
        publish(store, key=kernels(2)[1].meta.key, cubin=b"another")
        with store.installing([], ("13.1.1", "4.2.0")):
            pass
        before = snapshot(store)

        def refuse(*arguments: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **named)

        refused = ""
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where it is the lock that cannot be made, which is only wasteful
            patch.setattr(store_module.os, call, refuse)
            try:
                with store.installing(kernels(3), ("13.0.88", "4.2.0")):
                    pass
            except CacheError as error:
                refused = str(error)
        if refused:
            refusals += 1
            assert (snapshot(store), "nothing was installed" in refused) == (before, True), allowed
        else:
            assert len(store.entries()) == 3
        if left >= 0:
            break
    assert refusals
    assert left >= 0, "every call was refused once"


def test_what_the_body_raises_takes_the_kernels_out_again(store: BuildStore) -> None:
    publish(store)
    before = snapshot(store)

    def install(error: type[BaseException]) -> None:
        with store.installing(kernels(3), ("13.0.88", "4.2.0")):
            assert len(store.entries()) == 4
            raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            install(error)
        assert {name: text for name, text in snapshot(store).items() if name != "toolchains.json"} == before
        assert store.packed_with() == []


def test_a_description_is_the_same_text_for_the_same_kernel() -> None:
    assert encode_meta(meta_of()) == encode_meta(meta_of())
    assert msgspec.json.decode(encode_meta(meta_of()))["meta_sha256"]
