"""``srelu24 db``: the commands about tuning records."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from srelu24.cli import record_views, views
from srelu24.db import fit, health, rekey
from srelu24.db.database import Database
from srelu24.db.records import TuningRecord, read_file, read_records, write_file
from srelu24.tuning import recheck
from srelu24_gen import cost
from srelu24_gen.errors import Unsupported
from srelu24_gen.target import TARGETS, GpuTarget, target_by_key

app = typer.Typer(no_args_is_help=True, help="Tuning records: what is known to be best, and the evidence.")

OnlyGpu = Annotated[str | None, typer.Option("--gpu", help="Only records of this GPU, such as h200.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command("list")
def list_records(gpu: OnlyGpu = None, json: Json = False) -> None:
    """All records, shipped and your own."""
    records = _of_gpu(Database.open().records(), gpu)
    if json:
        views.show_json(records)
    else:
        views.show(record_views.records_table(records))


@app.command()
def show(
    kernel: Annotated[str, typer.Argument(help="A kernel's name, or how it begins.")], gpu: OnlyGpu = None
) -> None:
    """Whole records as JSON, with their evidence."""
    everything = Database.open().records()
    records = [r for r in _of_gpu(everything, gpu) if r.family.name.startswith(kernel)]
    if not records:
        known = ", ".join(sorted({r.family.name for r in everything})) or "none"
        raise Unsupported(f"there is no record for {kernel!r}; recorded kernels are: {known}")
    views.show_json(records)


@app.command()
def export(path: Annotated[Path, typer.Argument(help="A .json file, or a folder laid out as tuning_db.")]) -> None:
    """Write your records as text, for example to share or ship them."""
    views.note(f"{Database.open().export(path)} records written to {path}")


@app.command("import")
def import_(path: Annotated[Path, typer.Argument(help="A file or folder that `db export` wrote.")]) -> None:
    """Take records into your store; a record you have is replaced only by a newer one."""
    views.note(f"{Database.open().import_(path)} records taken from {path}")


@app.command()
def coverage(
    document: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The page to fill.")] = Path(
        "docs/tuning.md"
    ),
    results: Annotated[Path, typer.Option(metavar="DIR", exists=True, help="Where the result files are.")] = Path(
        "docs/results"
    ),
) -> None:
    """Fill the tables about tuning: shipped records with their evidence, and what tuning is worth."""
    from srelu24.documents import pages, registry

    tables = registry.of_records(Database.open().shipped_records()) | registry.of_results(results)
    changed = pages.fill(document, tables)
    views.note(f"{document} was {'changed' if changed else 'up to date'}")


@app.command()
def diff(
    path: Annotated[
        Path | None, typer.Argument(help="A file or folder that `db export` wrote; the shipped records by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Your records against the shipped or exported ones: new, another config, and whose evidence is faster."""
    database = Database.open()
    theirs = database.shipped_records() if path is None else read_records(path)
    found = health.diff(database.user_records(), theirs)
    if json:
        views.show_json(found)
        return
    # Most shipped records are for models that a user never tuned.
    quiet = {"same"} if path else {"same", "missing"}
    if shown := [each for each in found if each.what not in quiet]:
        views.show(record_views.differences_table(shown))
    counts = Counter(each.what for each in found)
    views.note(
        f"{counts['new']} new, {counts['config']} with another config, {counts['evidence']} with other evidence, "
        f"{counts['same']} the same, {counts['missing']} only theirs"
    )


@app.command()
def stale(gpu: OnlyGpu = None, json: Json = False) -> None:
    """Records whose kernels have changed since they were timed. They stay in use, as hints."""
    database = Database.open()
    rows = [
        (source, each)
        for source, records in (("yours", database.user_records()), ("shipped", database.shipped_records()))
        for each in health.stale(_of_gpu(records, gpu, database.records()))
    ]
    if json:
        views.show_json([{"source": source, "reason": each.reason, "record": each.row} for source, each in rows])
        return
    if rows:
        views.show(record_views.stale_table(rows))
    views.note(f"stale records: {len(rows)}; `srelu24 tune` replaces yours" if rows else "no record is stale")


@app.command()
def prune(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be dropped.")] = False,
    json: Json = False,
) -> None:
    """Drop your stale records and trials; shipped records stay."""
    database = Database.open()
    records = health.stale(database.user_records())
    trials = health.stale(database.all_trials())
    if not records and not trials and not json:
        views.note("nothing to drop: no record and no trial of yours is stale")
        return
    if records and not json:
        views.show(record_views.stale_table([("yours", each) for each in records]))
    views.note(f"stale records: {len(records)}, stale trials: {len(trials)}")
    drop = bool(records or trials) and not dry_run and (yes or typer.confirm("Drop them?", err=True))
    dropped = database.drop([*(each.row for each in records), *(each.row for each in trials)]) if drop else 0
    if json:
        views.show_json({"records": records, "trials": trials, "dropped": dropped})
    views.note(f"dropped: {dropped}" if drop else "nothing was dropped")


@app.command("rekey")
def rekey_records(
    before: Annotated[
        Path, typer.Argument(metavar="CHECKOUT", help="srelu24 as it was, with records that were not stale.")
    ],
    folder: Annotated[
        Path, typer.Option("--records", metavar="DIR", exists=True, help="Records laid out as tuning_db.")
    ] = Path("tuning_db"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
    json: Json = False,
) -> None:
    """Keep records whose kernels have other sources and the same machine code.

    Builds each recorded kernel from both trees and compares; exits with 1 when a record stays stale.
    """
    files = {file: read_file(file, strict=True) for file in sorted(folder.rglob("*.json"))}
    with views.progress() as bar:
        task = bar.add_task("building both trees' kernels", total=None)
        rekeyed = rekey.rekey(
            [record for records in files.values() for record in records],
            before,
            on_built=lambda done, of: bar.update(task, completed=done, total=of),
        )
    results = iter(rekeyed)
    for file, records in files.items():
        renewed = [next(results).record for _ in records]
        if renewed != records and not dry_run:
            write_file(file, renewed)
    counts = Counter(each.outcome for each in rekeyed)
    if json:
        views.show_json({"counts": counts, "records": rekeyed})
    left = [each for each in rekeyed if each.outcome not in ("current", "same")]
    if left and not json:
        views.show(record_views.rekeyed_table(left))
    views.note(f"{counts['same']} records renewed, {counts['current']} named today's kernels, {len(left)} stay stale")
    if left:
        raise typer.Exit(1)


@app.command()
def verify(json: Json = False) -> None:
    """Run the recorded winners of this GPU again and check their results; exits with 1 when one is wrong."""
    with contextlib.closing(recheck.GpuRunner()) as runner, views.progress() as bar:
        records = recheck.of_gpu(Database.open().records(), runner.target)
        task = bar.add_task(f"verifying on {runner.target.name}", total=len(records))
        verdicts = recheck.verify(records, runner, on_done=lambda _: bar.advance(task))
    if json:
        views.show_json(verdicts)
    elif wrong := [verdict for verdict in verdicts if verdict.outcome != "right"]:
        views.show(record_views.verdicts_table(wrong))
    counts = Counter(verdict.outcome for verdict in verdicts)
    views.note(
        f"right: {counts['right']}, failed: {counts['failed']}, not usable by this version: {counts['unusable']}"
        if verdicts
        else f"there is no record for {runner.target.name}; `srelu24 tune` makes them"
    )
    if counts["failed"]:
        raise typer.Exit(1)


@app.command("fit")
def fit_cost_model(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Trials that --save wrote; else those of your store.")
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Fit to your trials of this GPU, such as h200.")] = None,
    steps: Annotated[int, typer.Option(min=0, help="Of the search; 0 says how right the model is today.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the trials that were fitted to.")] = None,
    json: Json = False,
) -> None:
    """Fit the constants of the cost model to the trials of one GPU, and say how right it is.

    Ctrl-C ends the search with the best so far.
    """
    database = Database.open()
    target, trials = _trials(files or [], gpu, database)
    if save is not None:
        fit.save(trials, target, save)
    everything = {**fit.of_records(database.records(), target), **trials}
    today = cost.constants_of(target)
    before = fit.quality(everything, target, today)
    best, after = today, before
    with contextlib.suppress(KeyboardInterrupt), views.progress() as bar:
        task = bar.add_task(f"fitting to {target.name}", total=steps)
        for reached in fit.fit(everything, target, today, steps, seed):
            best, after = reached
            bar.update(task, advance=1, description=f"{after.behind:.2%} behind, times {after.rms:.1%} off")
    if json:
        views.show_json({"gpu": target.key, "before": before._asdict(), "after": after._asdict(), "constants": best})
        return
    views.show(record_views.fit_table(target, before, after, today, best))
    views.note(f'they belong in CONSTANTS["{target.key}"] of srelu24_gen/cost.py')


def _trials(files: list[Path], gpu: str | None, database: Database) -> tuple[GpuTarget, fit.Trials]:
    """Those of the files, which must be of one GPU, or those of the store. Of a problem in two files the last's: speeds
    are beside the others of a run."""
    if not files:
        trials = database.all_trials()
        known = sorted({trial.gpu for trial in trials})
        if gpu is None and len(known) != 1:
            raise Unsupported(f"your store has trials of {', '.join(known) or 'no GPU'}; name one with --gpu")
        target = target_by_key(gpu or known[0])
        return target, fit.of_store(trials, target)
    read = [fit.read(file) for file in files]
    targets = {target.key: target for target, _ in read}
    if len(targets) > 1 or gpu not in (None, *targets):
        raise Unsupported(f"these are trials of {', '.join(sorted(targets))}; give files of one GPU")
    return read[0][0], {problem: tried for _, trials in read for problem, tried in trials.items()}


def _of_gpu(
    records: list[TuningRecord], gpu: str | None, known: Iterable[TuningRecord] | None = None
) -> list[TuningRecord]:
    """Those of that GPU, which must be a target or be found in some record, by default in one of these."""
    if gpu is None:
        return records
    keys = {*TARGETS, *(r.gpu for r in known or records)}
    if gpu not in keys:
        raise Unsupported(f"there is no GPU {gpu!r}; known are {', '.join(sorted(keys))}")
    return [r for r in records if r.gpu == gpu]
