"""Fitting the cost model: to times that another set of constants made, and what of a tuning store counts."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from rows import CONFIG, H200, PROBLEM, record, trial
from srelu24.cli import main
from srelu24.db import fit
from srelu24.db.database import Database
from srelu24.db.fit import Timed, Trials
from srelu24.db.records import ChainStep
from srelu24_gen import cost, paths, space
from srelu24_gen.cost import Constants
from srelu24_gen.errors import RecordError
from srelu24_gen.models import Shape
from srelu24_gen.spec import DType, KernelConfig, Problem

OTHER = KernelConfig(tile_m=64, cluster_m=1, stages=5)
PLANTED = dataclasses.replace(Constants(), latency_cycles=2600.0, split_us=20.0, pj_shared=9.0)


def made_by(constants: Constants) -> Trials:
    """What a GPU would give of which the model with these constants knows everything."""
    found: Trials = {}
    for shape in (Shape(128, 4096, 16384), Shape(512, 2048, 8192), Shape(2048, 3072, 9216), Shape(16384, 4096, 4096)):
        for problem in (*shape.gemms(DType.BF16), *shape.dense_gemms(DType.BF16), *shape.gemms(DType.E4M3)):
            configs = space.candidates(problem, H200)[::5]
            times = [cost.predict(problem, config, H200, constants).us for config in configs]
            found[problem] = [Timed(c, us, times[0] / us) for c, us in zip(configs, times, strict=True)]
    return found


def test_constants_that_made_the_times_are_perfect_and_others_are_not() -> None:
    trials = made_by(PLANTED)
    perfect = fit.quality(trials, H200, PLANTED)
    assert (perfect.problems, perfect.rms, perfect.bias, perfect.behind, perfect.worst) == (24, 0, 0, 0, 0)
    assert perfect.loss == 0
    today = fit.quality(trials, H200, Constants())
    assert today.rms > 0.05
    assert today.worst >= today.behind > 0


def test_a_fit_comes_near_them_never_gets_worse_and_is_the_same_for_a_seed() -> None:
    trials = made_by(PLANTED)
    steps = list(fit.fit(trials, H200, Constants(), 300, seed=1))
    assert len(steps) == 300
    losses = [quality.loss for _, quality in steps]
    assert losses == sorted(losses, reverse=True)
    best, quality = steps[-1]
    assert quality == fit.quality(trials, H200, best)
    assert quality.loss < 0.6 * fit.quality(trials, H200, Constants()).loss
    for name in fit.KEPT:
        assert getattr(best, name) == getattr(Constants(), name)
    assert steps[20] == list(fit.fit(trials, H200, Constants(), 300, seed=1))[20]
    assert list(fit.fit(trials, H200, Constants(), 0)) == []


def test_a_file_holds_all_of_them(tmp_path: Path) -> None:
    trials, path = made_by(Constants()), tmp_path / "trials.json"
    fit.save(trials, H200, path)
    target, back = fit.read(path)
    assert target == H200
    assert back.keys() == trials.keys()
    for problem, tried in trials.items():
        assert {t.config for t in back[problem]} == {t.config for t in tried}
        speeds = {t.config: t.us for t in tried}
        assert all(timed.us == pytest.approx(speeds[timed.config], abs=0.006) for timed in back[problem])
    assert len(path.read_text().splitlines()) < len(trials) + 20, "a line a problem"
    with pytest.raises(RecordError, match="cannot be written"):
        fit.save(trials, H200, path / "below a file")


def of_problem(**changes: object) -> str:
    rows = [[64, 256, 1, "warpgroup", False, 8, 1.0, 1.0]]
    entry = {"family": "gemm_bf16", "m": 1, "n": 64, "k": 64, "trials": rows} | changes
    return json.dumps({"gpu": "h200", "problems": [entry]})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        '{"gpu": "h200"}',
        '{"gpu": "nothing", "problems": []}',
        of_problem(family="conv"),
        of_problem(m=-1),
        of_problem(trials=[[1, 2]]),
        of_problem(trials=[[64, 256, 1, "nobody", False, 8, 1.0, 1.0]]),
        of_problem(trials=[[64, 256, 1, "warpgroup", False, 8, 0.0, 1.0]]),
    ],
)
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(of_problem())
    assert len(fit.read(path)[1]) == 1
    path.write_text(content)
    with pytest.raises(RecordError, match=r"x\.json holds no trials"):
        fit.read(path)
    with pytest.raises(RecordError, match="holds no trials"):
        fit.read(tmp_path / "missing.json")


def test_of_a_store_the_best_measured_single_gemms_of_the_gpu_count() -> None:
    then = ChainStep(PROBLEM.family, PROBLEM.m, PROBLEM.n, PROBLEM.k, OTHER.to_dict())
    rows = [
        trial(4, ms=2.0, speedup=1.0),
        trial(8, ms=1.0, speedup=1.0),
        trial(2, ms=3.0, speedup=1.0),
        trial(1, config=OTHER.to_dict(), ms=4.0, speedup=0.5),
        trial(99, outcome="failed", reason="hangs"),
        trial(99, ms=0.1, speedup=1.0, then=then),
        trial(99, gpu="h100", ms=0.1, speedup=1.0),
        trial(99, config=KernelConfig(tile_m=192, stages=40).to_dict(), ms=0.1, speedup=1.0),
        trial(99, config={"tile_q": 1}, ms=0.1, speedup=1.0),
    ]
    found = fit.of_store(rows, H200)
    assert {timed.config: timed.us for timed in found[PROBLEM]} == {CONFIG: 1000.0, OTHER: 4000.0}
    assert list(found) == [PROBLEM]


def test_records_are_problems_with_one_trial() -> None:
    found = fit.of_records([record(), record(gpu="h100")], H200)
    assert found == {PROBLEM: [Timed(CONFIG, 1000 * record().evidence.ms, 1.0)]}
    quality = fit.quality(found, H200, Constants())
    assert (quality.behind, quality.worst) == (0, 0)
    assert quality.rms == abs(quality.bias) > 0


def test_without_trials_there_is_nothing_to_fit() -> None:
    with pytest.raises(RecordError, match="no trials"):
        fit.quality({}, H200, Constants())


def test_the_shipped_trials_are_as_the_model_is_said_to_know_them() -> None:
    path = Path(__file__).parents[3] / "docs/measurements/trials_h200.json"
    target, trials = fit.read(path)
    assert target == H200
    assert all(isinstance(problem, Problem) for problem in trials)
    assert sum(map(len, trials.values())) == sum(len(e["trials"]) for e in json.loads(path.read_text())["problems"])


# --- the command ---


@pytest.fixture
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """The database of the command line, empty."""
    (tmp_path / "shipped").mkdir()
    monkeypatch.setenv("SRELU24_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(paths, "shipped_records_dir", lambda: tmp_path / "shipped")
    return Database.open()


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main.app, ["db", "fit", *arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def printed(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def test_fit_says_how_right_the_cost_model_is_and_saves_what_it_fitted_to(db: Database, tmp_path: Path) -> None:
    db.add_trial(trial(ms=0.05, speedup=1.0), trial(config=OTHER.to_dict(), ms=0.06, speedup=0.8))
    db.put(record(m=512))
    file = tmp_path / "trials.json"
    found = printed("--steps", "20", "--save", str(file))
    assert found["gpu"] == "h200"
    assert found["before"]["problems"] == 2, "one with two trials, and a record"
    assert 0 < found["after"]["rms"] < found["before"]["rms"]
    assert found["constants"]["clock_share"] == 1500 / 1980
    again = printed(str(file), "--steps", "20")
    assert again["before"]["problems"] == 2
    table = run(str(file), "--steps", "0")
    assert "cost model, 2 problems on NVIDIA H200" in table.stdout
    assert "latency_cycles" in table.stdout
    assert 'CONSTANTS["h200"]' in table.stderr


def test_fit_needs_trials_of_one_gpu(db: Database, tmp_path: Path) -> None:
    assert "trials of no GPU" in run(code=1).stderr
    db.add_trial(trial(ms=1.0, speedup=1.0), trial(ms=1.0, speedup=1.0, gpu="h100"))
    assert "trials of h100, h200; name one with --gpu" in run(code=1).stderr
    files = [tmp_path / "h100.json", tmp_path / "h200.json"]
    for file in files:
        run("--gpu", file.stem, "--steps", "0", "--save", str(file))
    assert "give files of one GPU" in run(*map(str, files), code=1).stderr
    assert "give files of one GPU" in run(str(files[0]), "--gpu", "h200", code=1).stderr
    assert "no trials of this GPU" in run("--gpu", "gh200", code=1).stderr
    assert "holds no trials" in run(str(tmp_path / "missing.json"), code=1).stderr


def test_ctrl_c_ends_a_fit_with_the_best_so_far(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    db.add_trial(trial(ms=0.05, speedup=1.0))
    search = fit.fit

    def interrupted(*arguments: Any) -> Iterator[tuple[Any, Any]]:
        yield from itertools.islice(search(*arguments), 30)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "fit", interrupted)
    found = printed("--steps", "1000")
    assert found["after"]["rms"] < found["before"]["rms"]
