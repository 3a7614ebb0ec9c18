"""Rows of the tuning database, made up for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from srelu24.db.database import Database
from srelu24.db.records import Evidence, Trial, TuningRecord
from srelu24_gen.spec import DType, Family, KernelConfig, Op
from srelu24_gen.target import TARGETS

H200, H100 = TARGETS["h200"], TARGETS["h100"]
SPGEMM = Family(Op.SPGEMM, DType.BF16)
CONFIG = KernelConfig(tile_m=128, tile_n=256, stages=3)


def evidence(**changes: Any) -> Evidence:
    fields = {"ms": 1.0, "default_ms": 1.1, "samples": 20, "source_digest": "d", "when": "2026-01-01T00:00:00Z"}
    return Evidence(**(fields | changes))


def record(m: int = 4096, n: int = 4096, k: int = 16384, **changes: Any) -> TuningRecord:
    fields: dict[str, Any] = {
        "family": SPGEMM,
        "arch": "sm_90a",
        "gpu": "h200",
        "config": CONFIG.to_dict(),
        "density": 0.1,
        "evidence": evidence(),
    }
    return TuningRecord(m=m, n=n, k=k, **(fields | changes))


def trial(number: int = 0, **changes: Any) -> Trial:
    fields: dict[str, Any] = {
        "family": SPGEMM,
        "m": 4096,
        "n": 4096,
        "k": 16384,
        "arch": "sm_90a",
        "gpu": "h200",
        "config": CONFIG.to_dict(),
        "density": 0.1,
        "stage": "screen",
        "outcome": "ok",
        "samples": number,
    }
    return Trial(**(fields | changes))


PROBLEM = record().problem


def ship(db: Database, records: list[TuningRecord], gpu: str = "h200") -> Path:
    """Put records into the shipped folder as a maintainer would."""
    other = Database.open(db.shipped_folder, db.user_file.with_name("maintainer.sqlite"))
    for each in records:
        other.put(each)
    other.export(db.shipped_folder)
    return db.shipped_folder / "sm_90a" / gpu / f"{records[0].family.name}.json"
