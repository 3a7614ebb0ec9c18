"""Bundles of every kind: a load takes what was packed, whole, or is one sentence and leaves nothing."""

from __future__ import annotations

import contextlib
import random
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import hostile
import pytest
from attacks import Attack

from srelu24.db.database import Database
from srelu24.shipping import bundle
from srelu24_gen.errors import Srelu24Error
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType
from srelu24_gen.store import BuildStore
from srelu24_gen.target import TARGETS
from tampered_bundle import reseal, rewritten

NAMES = (
    "../outside",
    "/tmp/srelu24-outside",
    "kernels/../../outside",
    "kernels/a-0123456789abcdef/../../x",
    "records/x",
)


@pytest.fixture
def packed(compiled: None, tmp_path: Path) -> Path:
    path = tmp_path / "good" / "bundle.zip"
    shipped = Path(__file__).parents[2] / "tuning_db"
    db = Database.open(shipped, tmp_path / "maker.sqlite")
    bundle.pack(path, [Shape(64, 320, 832)], DType.BF16, TARGETS["h200"], db=db)
    return path


def tampered(path: Path, draw: random.Random) -> Path:
    """One more bundle in the place of the last one."""
    if draw.random() < 0.4:
        other = path.with_name("other.zip")
        other.write_bytes(hostile.damaged(path.read_bytes(), draw))
        return other

    def change(files: dict[str, bytes], manifest: dict[str, Any]) -> None:
        name = draw.choice(list(files))
        kind = draw.randrange(7)
        if kind == 0:
            files[name] = hostile.damaged(files[name], draw)
        elif kind == 1:
            files[name] = files[draw.choice([other for other in files if other.endswith(Path(name).name)])]
        elif kind == 2:
            files[draw.choice(NAMES)] = files.pop(name)
        elif kind == 3:
            del files[name]
        elif kind == 4:
            manifest[draw.choice(list(manifest))] = draw.choice(hostile.VALUES)
        else:
            end = draw.choice(("meta.json", ".json"))
            name = draw.choice([other for other in files if other.endswith(end)])
            files[name] = hostile.twisted(files[name], draw)
            with contextlib.suppress(Exception):  # what is no description any more has no digest either
                files[name] = reseal(files[name])

    return rewritten(path, change, rehash=draw.random() < 0.8)


def test_bundles(packed: Path, tmp_path: Path) -> None:
    attack = Attack("bundles", 0.25)
    around = sorted(tmp_path.rglob("*"))
    with zipfile.ZipFile(packed) as archive:
        genuine = {archive.read(name) for name in archive.namelist()}
    for draw in attack:
        path = tampered(packed, draw)
        db = Database.open(tmp_path / "none", tmp_path / "here" / "tuning.sqlite")
        store = BuildStore(tmp_path / "here" / "cache")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                loaded = bundle.load(path, db=db, store=store)
            except Srelu24Error as error:
                attack.counts["refused"] += 1
                sentence = str(error)
                assert "\n" not in sentence
                assert len(sentence) < 3000
                assert not (tmp_path / "here").exists(), "nothing is installed"
            else:
                attack.counts["taken"] += 1
                kept = list(store.folder.rglob("kernel.*"))
                assert len(store.entries()) == loaded.kernels
                assert {file.read_bytes() for file in kept} <= genuine
                assert len(db.user_records()) == loaded.records
                shutil.rmtree(tmp_path / "here")
        path.unlink()
        assert sorted(tmp_path.rglob("*")) == around, "and nothing lies anywhere else"


def test_descriptions_in_the_cache(packed: Path, tmp_path: Path) -> None:
    attack = Attack("descriptions in the cache", 0.08)
    store = BuildStore(tmp_path / "cache2")
    bundle.load(packed, db=Database.open(tmp_path / "none", tmp_path / "a.sqlite"), store=store)
    known = {meta.key: meta for meta in store.entries()}
    files = {path: path.read_bytes() for path in sorted(store.folder.rglob("meta.json"))}
    for draw in attack:
        path = draw.choice(list(files))
        text = hostile.damaged(files[path], draw) if draw.random() < 0.6 else hostile.twisted(files[path], draw)
        path.write_bytes(text)
        served = {meta.key: meta for meta in store.entries()}
        attack.counts["misses"] += len(served) < len(known)
        assert all(known[key] == meta for key, meta in served.items())
        assert len(served) == len(known) - (text != files[path])
        path.write_bytes(files[path])
