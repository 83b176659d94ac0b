"""What audits leave behind: audit.json, audit.md and audit.html with a plot for each."""

import base64
import datetime
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from lightning_dp.auditing.plots import audit_plot
from lightning_dp.auditing.result import AuditResult, worst_verdict
from lightning_dp.errors import ConfigurationError
from lightning_dp.evaluation.card_page import html_page

JSON_FILE, MARKDOWN_FILE, PAGE_FILE = "audit.json", "audit.md", "audit.html"


def write_report(folder: Path, results: Sequence[AuditResult], *, title: str, note: str | None = None) -> list[Path]:
    """Write the report of some audits.

    Args:
        folder: Where; made if missing, with the rights of its owner alone where the note says that it is private.
        results: The audits.
        title: What was audited.
        note: What a reader must know of the report itself, or None.

    Returns: The files.

    Raises:
        ConfigurationError: They cannot be written.
    """
    verdict = worst_verdict(results)
    record = {
        "title": title,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "verdict": str(verdict),
        "note": note,
        "audits": [result.to_dict() for result in results],
    }
    texts = {
        JSON_FILE: json.dumps(record, indent=2) + "\n",
        MARKDOWN_FILE: _markdown(record, results),
        PAGE_FILE: html_page(f"Audit: {title}", _body(record, results)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            path = folder / name
            path.write_text(text, encoding="utf-8")
            if note is not None:
                path.chmod(0o600)
    except OSError as error:
        raise ConfigurationError(f"Cannot write to {folder} ({error.strerror}); choose another --out.") from None
    return [folder / name for name in texts]


def number(value: float | str | None) -> str:
    """Return an epsilon as a reader wants it."""
    if value is None:
        return "—"
    return f"{value:.3f}" if isinstance(value, int | float) else value


def _markdown(record: dict[str, Any], results: Sequence[AuditResult]) -> str:
    lines = [f"# Audit: {record['title']}", "", f"{record['created']}; verdict: **{record['verdict']}**.", ""]
    lines += [f"> {record['note']}", ""] if record["note"] else []
    lines += ["| audit | verdict | lower bound | confidence | claimed epsilon | delta | measured |", "|" + "---|" * 7]
    for found in (result.to_dict() for result in results):
        lines.append(
            f"| {found['audit']} | {found['verdict']} | {number(found['lower_bound'])} | {found['confidence']:g} | "
            f"{number(found['claimed_epsilon'])} | {found['delta']:g} | {found['summary']} |"
        )
    lines += ["", "## What each audit can find, and what it cannot", ""]
    lines += [f"* **{result.audit}** finds {result.finds}. It misses {result.misses}." for result in results]
    return "\n".join(lines) + "\n"


def _body(record: dict[str, Any], results: Sequence[AuditResult]) -> str:
    parts = [
        f"<h1>Audit: {escape(record['title'])}</h1>",
        f'<p class="soft">{escape(record["created"])}; verdict: <strong>{escape(record["verdict"])}</strong></p>',
        f"<p><strong>{escape(record['note'])}</strong></p>" if record["note"] else "",
    ]
    for result in results:
        found = result.to_dict()
        rows = {
            "verdict": found["verdict"],
            "lower bound on epsilon": f"{number(found['lower_bound'])} (confidence {found['confidence']:g})",
            "claimed epsilon": f"{number(found['claimed_epsilon'])} at delta {found['delta']:g}",
            "measured": found["summary"],
            "can find": found["finds"],
            "cannot find": found["misses"],
            "subject": found["subject"],
        }
        cells = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in rows.items())
        picture = audit_plot(result)
        image = (
            f'<img alt="{escape(result.audit)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
            if picture is not None
            else ""
        )
        parts.append(f"<h2>{escape(result.audit)}</h2>{image}<table>{cells}</table>")
    return "\n".join(part for part in parts if part)
