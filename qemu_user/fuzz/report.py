"""The report of a run: DIR/report.html, one page with the figures, the findings, and a plot of coverage over time.

From what the run left in its directory (figures.jsonl, reached.json, findings/), so that it can be made again at any
time. The plot is SVG without any library.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from protocol.abi.ioctls import IOCTLS
from qemu_user.fuzz.sequence import load

_WIDTH, _HEIGHT, _MARGIN = 760, 260, 46
_SERIES = (
    ("states", "#1f6feb", "protocol states"),
    ("lines", "#2da44e", "ways through the server's lines"),
    ("corpus", "#bf8700", "corpus"),
)


def plot(rows: list[dict[str, Any]]) -> str:
    """The SVG: one curve per series, each on its own scale, over seconds."""
    if not rows:
        return "<p>No figures yet.</p>"
    end = max(float(rows[-1]["seconds"]), 1.0)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="coverage over time">']
    x0, y0, x1, y1 = _MARGIN, _HEIGHT - 30, _WIDTH - 10, 20
    parts.append(f'<path d="M{x0} {y1}V{y0}H{x1}" fill="none" stroke="currentColor"/>')
    for tick in range(5):
        x = x0 + (x1 - x0) * tick / 4
        parts.append(
            f'<text x="{x:.0f}" y="{y0 + 16}" font-size="11" text-anchor="middle" fill="currentColor">'
            f"{end * tick / 4:.0f} s</text>"
        )
    for place, (key, colour, label) in enumerate(_SERIES):
        top = max((float(row.get(key, 0)) for row in rows), default=0)
        if not top:
            continue
        points = " ".join(
            f"{x0 + (x1 - x0) * float(row['seconds']) / end:.1f},{y0 - (y0 - y1) * float(row.get(key, 0)) / top:.1f}"
            for row in rows
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x0 + 8}" y="{y1 + 12 + 14 * place}" font-size="12" fill="{colour}">{label}: {top:.0f}</text>')
    return "".join([*parts, "</svg>"])


def write(directory: Path) -> Path:
    """Make the report; its path. OSError, ValueError: DIR holds no run."""
    lines = (directory / "figures.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    reached_file = directory / "reached.json"
    reached: dict[str, int] = json.loads(reached_file.read_text()) if reached_file.exists() else {}
    last = rows[-1] if rows else {}
    seconds = float(last.get("seconds", 0)) or 1.0
    body = [
        "<h1>softkvm fuzz</h1>",
        f"<p>{last.get('sequences', 0)} sequences, {last.get('operations', 0)} operations in {seconds:.0f} s "
        f"({last.get('sequences', 0) / seconds:.0f} sequences/s, {last.get('operations', 0) / seconds:.0f} operations/s). "
        f"{last.get('findings', 0)} findings.</p>",
        plot(rows), "<h2>Findings</h2>", _findings(directory), "<h2>What was reached</h2>", _reached(reached),
    ]  # fmt: skip
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>softkvm fuzz</title>"
        "<style>:root{color-scheme:light dark}body{font:15px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.15rem .6rem;text-align:left;border-bottom:1px solid #8884}"
        "pre{white-space:pre-wrap}</style>" + "".join(body)
    )
    path = directory / "report.html"
    path.write_text(page + "\n")
    return path


def _findings(directory: Path) -> str:
    parts = []
    for path in sorted((directory / "findings").glob("*.jsonl")):
        head, ops = load(path)
        parts.append(
            f"<h3>{html.escape(path.name)}</h3><p><b>{html.escape(str(head.get('oracle', '')))}</b>, {len(ops)} operations. "
            f"<code>softkvm fuzz replay {html.escape(str(path))}</code></p><pre>{html.escape(str(head.get('text', '')))}</pre>"
        )
    return "".join(parts) or "<p>None.</p>"


def _reached(reached: dict[str, int]) -> str:
    rows = []
    for row in IOCTLS:
        outcomes: dict[str, int] = {}
        for key, count in reached.items():
            name, kind, errno = (key.split(" ") + ["", ""])[:3]
            if name == row.name and kind in row.on:
                outcomes[errno or "0"] = outcomes.get(errno or "0", 0) + count
        text = ", ".join(f"{errno} {count}" for errno, count in sorted(outcomes.items())) or "<b>never</b>"
        rows.append(f"<tr><td>{row.name}</td><td>{text}</td></tr>")
    return "<table><tr><th>ioctl</th><th>answers, how often</th></tr>" + "".join(rows) + "</table>"
