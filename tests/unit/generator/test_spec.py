"""The vocabulary: names and digests tell binaries apart, configs survive JSON, bad fields are refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srelu24_gen.errors import Unsupported
from srelu24_gen.space import supports_family, tiles
from srelu24_gen.spec import Activation, DType, Family, KernelConfig, KernelSpec, Op, Problem, Producer
from srelu24_gen.target import TARGETS

FLAGS = (False, True)
TYPES = (None, *DType)
every_family = itertools.starmap(
    Family, itertools.product(Op, DType, Activation, FLAGS, FLAGS, FLAGS, TYPES, TYPES, FLAGS)
)
families = st.sampled_from([family for family in every_family if supports_family(family).ok])
TILES = tiles(TARGETS["h200"])
configs = st.builds(
    KernelConfig,
    tile_m=st.sampled_from([m for m, _ in TILES]),
    tile_n=st.sampled_from([n for _, n in TILES]),
    cluster_m=st.sampled_from([1, 2]),
    stages=st.integers(2, 8),
    producer=st.sampled_from(Producer),
    stream_k=st.booleans(),
    raster_group=st.sampled_from([1, 4, 8, 16]),
)


def spec_of(family: Family, config: KernelConfig) -> KernelSpec:
    return KernelSpec(family, config if family.op.multiplies else KernelConfig())


specs = st.builds(spec_of, families, configs)


@given(specs, specs)
def test_equal_names_and_digests_mean_equal_binaries(a: KernelSpec, b: KernelSpec) -> None:
    same = (a.family, a.config.compiled()) == (b.family, b.config.compiled())
    assert (a.name == b.name) == same
    assert (a.digest == b.digest) == same


@given(specs)
def test_names_are_file_names(spec: KernelSpec) -> None:
    assert re.fullmatch(r"[a-z0-9_]+", spec.name)
    assert len(spec.name) < 120
    assert spec.name.startswith(spec.family.name)


@given(configs)
def test_a_config_survives_json(config: KernelConfig) -> None:
    assert KernelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(configs, st.integers(1, 64))
def test_runtime_fields_do_not_make_another_binary(config: KernelConfig, group: int) -> None:
    other = dataclasses.replace(config, raster_group=group)
    family = Family(Op.GEMM, DType.BF16)
    assert KernelSpec(family, config).name == KernelSpec(family, other).name
    assert KernelSpec(family, config).digest == KernelSpec(family, other).digest
    assert other.runtime_fields() == {"raster_group": group}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tile_q": 1}, "tile_q.*tile_m"),
        ({"tile_m": "128"}, "tile_m.*'128'.*whole number"),
        ({"tile_m": 128.0}, "tile_m.*128.0.*whole number"),
        ({"stages": True}, "stages.*True.*whole number"),
        ({"producer": "robot"}, "producer.*'robot'.*warpgroup, thread"),
    ],
)
def test_bad_config_fields_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        KernelConfig.from_dict(fields)


def test_the_digest_is_the_same_in_every_process() -> None:
    program = (
        "from srelu24_gen.spec import *;"
        "print(KernelSpec(Family(Op.SPGEMM, DType.FP16, bias=True), KernelConfig(tile_m=192)).digest)"
    )
    digests = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        digests.add(subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True).stdout)
    assert len(digests) == 1


def test_flops_count_a_multiplication_and_an_addition() -> None:
    assert Problem(Family(Op.GEMM, DType.BF16), 3, 5, 7).flops == sum(2 for _ in range(3 * 5 * 7))
