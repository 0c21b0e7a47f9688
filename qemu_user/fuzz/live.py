"""The live view of a run on a terminal; elsewhere a line a minute."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from qemu_user.fuzz.campaign import Figures


class Live:
    """`with Live() as live: ... live.show(figures)`."""

    def __enter__(self) -> Live:
        self._line = 0.0
        self._live = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live as RichLive

            self._live = RichLive(console=Console(stderr=True), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, figures: Figures) -> None:
        """The figures as they are."""
        seconds = max(figures.seconds, 0.001)
        rows = (
            ("time", f"{seconds:.0f} s"), ("sequences", f"{figures.sequences}  ({figures.sequences / seconds:.0f}/s)"),
            ("operations", f"{figures.operations}  ({figures.operations / seconds:.0f}/s, {figures.refused} refused)"),
            ("attacks", str(figures.attacks)), ("states", str(len(figures.reached))),
            ("lines", str(figures.lines or "not watched")),
            ("corpus", str(figures.corpus)), ("findings", str(figures.findings)),
        )  # fmt: skip
        if self._live is not None:
            from rich.table import Table

            table = Table.grid(padding=(0, 2))
            for name, value in rows:
                table.add_row(f"[bold]{name}[/]", f"[red]{value}[/]" if name == "findings" and figures.findings else value)
            self._live.update(table, refresh=True)
        elif time.monotonic() - self._line > 60:
            self._line = time.monotonic()
            sys.stderr.write("softkvm fuzz: " + ", ".join(f"{name} {value}" for name, value in rows) + "\n")
