"""``srelu24 cache``: the folder of compiled kernels."""

from __future__ import annotations

from typing import Annotated

import typer

from srelu24.cli import options, views
from srelu24.cli.table import Table
from srelu24_gen.store import BuildStore

app = typer.Typer(no_args_is_help=True, help="The compiled kernels on this machine (SRELU24_CACHE_DIR).")


@app.command("list")
def list_kernels(json: options.Json = False) -> None:
    """Every intact kernel in the cache."""
    store = BuildStore()
    kernels = store.entries()
    if json:
        views.show_json(kernels)
        return
    columns = ("key", "registers", "spill bytes", "KiB", "NVRTC", "CUTLASS")
    table = Table("kernels", columns, right=(1, 2, 3))
    for each in kernels:
        table.add_heading(each.name)
        numbers = (str(each.registers), str(each.spill_bytes), f"{each.cubin_bytes / 1024:.0f}")
        table.add_row(each.key[:16], *numbers, each.nvrtc_version, each.cutlass_version)
    if kernels:
        views.show(table)
    size = sum(each.cubin_bytes for each in kernels) / 2**20
    views.note(f"{len(kernels)} kernels of {size:.1f} MiB in {store.folder}")


@app.command()
def clear(yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Remove every kernel; what is needed is compiled again, and bundles have to be loaded again."""
    store = BuildStore()
    if not yes and not typer.confirm(f"Remove {len(store.entries())} kernels from {store.folder}?", err=True):
        views.note("nothing was removed")
        return
    views.note(f"{store.clear()} kernels removed from {store.folder}")


@app.command()
def sweep() -> None:
    """Remove what no build uses: damaged kernels, logs of failed builds, and what killed builds left an hour ago."""
    store = BuildStore()
    views.note(f"{store.sweep()} folders removed from {store.folder}")
