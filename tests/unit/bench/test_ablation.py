"""The ablation on a CPU: what each variant computes, that runs are kept and repeatable, and its documents."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import msgspec
import pytest
import torch
from typer.testing import CliRunner

from srelu24.bench.ablation import corpus as corpora
from srelu24.bench.ablation import runs
from srelu24.bench.ablation.corpus import Corpus
from srelu24.bench.ablation.model import Transformer
from srelu24.bench.ablation.results import AblationFile, Grouping, Run, Setup, Variant
from srelu24.bench.ablation.variants import attach
from srelu24.bench.results import load_results
from srelu24.cli.main import app
from srelu24.documents import ablation, registry
from srelu24_gen.errors import RecordError, Unsupported

SETUP = Setup(
    layers=1,
    width=16,
    hidden=64,
    heads=2,
    context=16,
    batch=2,
    steps=4,
    warmup_steps=2,
    refresh=2,
    validation_batches=1,
)


@pytest.fixture(scope="module")
def text() -> Corpus:
    words = torch.randint(97, 123, (8192,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Corpus(words[:6000], words[6000:], "digest")


@pytest.fixture(scope="module")
def finished(text: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AblationFile]:
    path = tmp_path_factory.mktemp("ablation") / "training_ablation.json"
    return path, runs.ablate(SETUP, list(Variant), [0], path=path, device="cpu", corpus=text)


def attached(model: Transformer, variant: Variant, warmup_steps: int) -> Transformer:
    """A copy of the model that computes as the variant does."""
    model = copy.deepcopy(model)
    attach(variant, model, warmup_steps=warmup_steps, refresh=2)
    return model


def test_corpus_is_whole_files_in_an_order_of_their_names(tmp_path: Path) -> None:
    for index in range(300):
        (tmp_path / f"{index}.py").write_bytes(b"%03d" % index * 500)
    (tmp_path / "image.png").write_bytes(b"x" * 9999)
    one = corpora.load(roots=[tmp_path])
    assert one.digest == corpora.load(roots=[tmp_path]).digest
    assert len(one.train) + len(one.validation) == 300 * 1501
    pieces = bytes(one.validation.tolist()).split(b"\0")[:-1]
    assert 0 < len(pieces) < 30
    assert all(piece == piece[:3] * 500 for piece in pieces)
    with pytest.raises(Unsupported, match="at least 4096 of each"):
        corpora.load(roots=[tmp_path / "none"])


def test_batches_are_pieces_of_the_text(text: Corpus) -> None:
    batch = corpora.batch(text.train, 3, 20, torch.Generator().manual_seed(1))
    assert batch.shape == (3, 21)
    whole = bytes(text.train.tolist())
    assert all(bytes(row.tolist()) in whole for row in batch)
    with pytest.raises(Unsupported, match="longer than the text, which has"):
        corpora.batch(text.train, 3, len(text.train), torch.Generator())


def test_the_model_sees_nothing_of_the_future(text: Corpus) -> None:
    torch.manual_seed(0)
    model = Transformer(layers=2, width=16, hidden=64, heads=2, context=16)
    torch.nn.init.normal_(model.head)
    attach(Variant.RECIPE, model, warmup_steps=0, refresh=1)
    outputs = []
    model.blocks[-1].register_forward_hook(lambda _, __, y: outputs.append(y))
    tokens = corpora.batch(text.train, 1, 16, torch.Generator().manual_seed(1))
    model(tokens)
    changed = tokens.clone()
    changed[0, 9:] += 1
    model(changed)
    assert torch.equal(outputs[0][:, :9], outputs[1][:, :9])
    assert not torch.equal(outputs[0][:, 9:], outputs[1][:, 9:])


def test_variants_differ_where_they_should(text: Corpus) -> None:
    torch.manual_seed(0)
    model = Transformer(layers=1, width=16, hidden=64, heads=2, context=16)
    torch.nn.init.normal_(model.head)
    tokens = corpora.batch(text.train, 4, 16, torch.Generator().manual_seed(1))
    dense = float(attached(model, Variant.DENSE, 0)(tokens).detach())
    gradients = {}
    for variant in Variant:
        warm = float(attached(model, variant, 5)(tokens).detach())
        assert warm == pytest.approx(dense, rel=1e-5) or variant is Variant.NO_WARMUP
        sparse = attached(model, variant, 0)
        sparse(tokens).backward()
        grad = sparse.ffns[0].up.weight.grad
        assert grad is not None
        gradients[variant] = grad.clone()
    same = torch.equal(gradients[Variant.RECIPE], gradients[Variant.NO_WARMUP])
    assert same
    # With F = 64 all features are in the one dense tile, so only what leaves that out prunes along tokens.
    assert torch.equal(gradients[Variant.RECIPE], gradients[Variant.NO_PERMUTATION])
    torch.testing.assert_close(gradients[Variant.RECIPE], gradients[Variant.REFERENCE])
    for variant in (Variant.DENSE, Variant.NAIVE_BACKWARD, Variant.NO_MASK_REUSE):
        assert not torch.allclose(gradients[Variant.RECIPE], gradients[variant], rtol=1e-3), variant


def test_all_variants_are_trained_and_kept(finished: tuple[Path, AblationFile], text: Corpus) -> None:
    path, file = finished
    assert [run.variant for run in file.runs] == list(Variant)
    assert all(run.final_loss is not None and 4 < run.final_loss < 7 for run in file.runs)
    assert all(len(run.densities) == 1 and 0 < run.densities[0] < 1 for run in file.runs)
    assert {g.stride for g in file.groupings} == set(runs.STRIDES)
    assert all(0 <= g.dropped_with_dense_features <= g.dropped < 1 for g in file.groupings)
    assert AblationFile.load(path) == file
    said: list[str] = []
    again = runs.ablate(SETUP, list(Variant), [0], path=path, device="cpu", corpus=text, on_event=said.append)
    assert again == file
    assert all("done before" in line for line in said)


def test_a_run_is_repeatable(finished: tuple[Path, AblationFile], text: Corpus) -> None:
    run, _ = runs.train(SETUP, Variant.RECIPE, 0, text, torch.device("cpu"))
    before = next(run for run in finished[1].runs if run.variant is Variant.RECIPE)
    assert run.losses == before.losses
    assert run.final_loss == before.final_loss


def test_a_run_that_diverges_is_told(text: Corpus, tmp_path: Path) -> None:
    setup = msgspec.structs.replace(SETUP, learning_rate=1e30, steps=30)
    run, groupings = runs.train(setup, Variant.DENSE, 0, text, torch.device("cpu"))
    assert run.final_loss is None
    assert run.diverged_at in (10, 20, 30)
    assert groupings == []


def test_other_settings_are_refused_and_time_is_kept(
    finished: tuple[Path, AblationFile], text: Corpus, tmp_path: Path
) -> None:
    other = msgspec.structs.replace(SETUP, steps=5)
    with pytest.raises(RecordError, match="is of the setup"):
        runs.ablate(other, [Variant.DENSE], [0], path=finished[0], device="cpu", corpus=text)
    with pytest.raises(Unsupported, match="at least one variant"):
        runs.ablate(SETUP, [], [0], path=tmp_path / "a.json", device="cpu", corpus=text)
    with pytest.raises(Unsupported, match="heads of even size"):
        runs.ablate(
            msgspec.structs.replace(SETUP, width=18), [Variant.DENSE], [0], path=tmp_path / "a.json", device="cpu"
        )
    said: list[str] = []
    file = runs.ablate(
        SETUP, list(Variant), [0], path=tmp_path / "b.json", device="cpu", corpus=text, seconds=0, on_event=said.append
    )
    assert file.runs == []
    assert "stopped before dense, seed 0" in said[0]
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(RecordError, match="no AblationFile"):
        AblationFile.load(tmp_path / "c.json")


def made_up() -> AblationFile:
    def run(variant: Variant, seed: int, final: float | None) -> Run:
        losses = [(10, 3.0), (20, final or 9.0)]
        return Run(
            variant=variant,
            seed=seed,
            parameters=10**7,
            losses=losses,
            final_loss=final,
            ms_per_step=5.0,
            densities=[0.1],
        )

    runs_ = [run(Variant.DENSE, 0, 1.0), run(Variant.DENSE, 1, 1.2), run(Variant.NO_MASK_REUSE, 0, None)]
    runs_ += [run(Variant.RECIPE, 1, 1.3), run(Variant.REFERENCE, 1, 1.4), run(Variant.REFERENCE, 0, 1.5)]
    drops = {None: 0.01, 0: 0.3}
    groups = [
        Grouping(seed=0, layer=layer, stride=stride, dropped=drop, dropped_with_dense_features=drop / 2)
        for stride, drop in drops.items()
        for layer in (0, 1)
    ]
    env = {"gpu": "G", "torch": "2", "date": "2026-01-01"}
    return AblationFile(env=env, setup=SETUP, corpus_bytes=10, corpus_digest="d", runs=runs_, groupings=groups)


def test_tables_and_plot(tmp_path: Path) -> None:
    made = registry.of_ablation(made_up())
    assert "| dense | 2 | 1.1000 | 1.0000 .. 1.2000 | +0.0000 | 10.0% | 5.0 |" in made["training_ablation"]
    assert "| no mask reuse | 1, 1 diverged | - | - | - | 10.0% | 5.0 |" in made["training_ablation"]
    # Over the dense run of its own seed.
    assert "| recipe | 1 | 1.3000 | 1.3000 .. 1.3000 | +0.1000 | 10.0% | 5.0 |" in made["training_ablation"]
    assert made["training_agreement"].count("| 20 | 1.3000, 1.4000 | -0.1000 | 0.0000 |") == 1
    assert "seed 0" not in made["training_agreement"]
    assert "| widest | 1.00% | 0.50% | 1.00% | 1.00% |" in made["token_groups"]
    pytest.importorskip("matplotlib")
    ablation.plot(made_up(), tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_result_folders_may_hold_an_ablation(finished: tuple[Path, AblationFile]) -> None:
    assert load_results(finished[0].parent) == []


def test_the_command_refuses_an_unknown_variant(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "training", "--json", str(tmp_path / "x.json"), "--variant", "none"])
    assert result.exit_code == 2
    assert "no variant 'none'" in result.output


def test_the_report_fills_a_page_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, page = tmp_path / "gpu" / "training_ablation.json", tmp_path / "page.md"
    made_up().save(path)
    marks = ("step", "split", "training_ablation", "training_agreement", "token_groups")
    page.write_text("".join(f"<!-- results:{name} -->\n<!-- /results -->\n" for name in marks))
    arguments = ["bench", "training-report", "--json", str(path), "--results", str(tmp_path), "--page", str(page)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert "| dense | 2 | 1.1000 |" in page.read_text()
    assert "| neighbours |" in page.read_text()
    assert path.with_suffix(".svg").exists()


def test_the_training_page_asks_only_for_tables_that_exist(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    known = registry.of_results(tmp_path) | registry.of_ablation(made_up())
    assert set(re.findall(r"<!-- results:(\w+) -->", text)) <= set(known)
