"""The run card as one HTML page: inline style, images as data, no script and no network. Every value is escaped."""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lightning_dp.evaluation.card_plots import epsilon_plot
from lightning_dp.evaluation.card_text import ceil_text, is_proved, number_text, seconds_text

_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6878; --line: #dfe4ea; --tint: #f5f7f9; --accent: #1f5fa8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--tint); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .75rem; }
h3 { font-size: .95rem; margin: 1.1rem 0 .3rem; }
p { margin: .3rem 0; }
.soft { color: var(--soft); font-size: .9rem; }
section, .tile { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
section { padding: 1.25rem 1.4rem; margin: 1rem 0; }
.level { display: inline-block; padding: .1rem .7rem; border-radius: 1rem; color: #fff; font-size: .85rem; }
.PROVED { background: #1a7f4b; } .CONDITIONAL { background: #96650b; }
.UNVERIFIED { background: #a84c14; } .NONPRIVATE { background: #b3261e; }
.statement { font-size: 1.15rem; margin: .7rem 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; }
.tile { padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile span { color: var(--soft); font-size: .85rem; }
.warning { border-left: 4px solid #c98a12; background: #fdf6e7; padding: .5rem .8rem; margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .6rem .35rem 0; border-top: 1px solid var(--line); vertical-align: top; }
tr:first-child > * { border-top: 0; }
th { font-weight: 500; color: var(--soft); width: 17rem; }
td { overflow-wrap: anywhere; }
ul { margin: .2rem 0; padding-left: 1.2rem; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
img { max-width: 100%; height: auto; display: block; }
.pixels { image-rendering: pixelated; border-radius: 4px; }
.columns { display: grid; gap: 0 1rem; align-items: start; }
.columns { grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.columns th { width: 45%; }
details summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--tint); padding: .8rem; border-radius: 6px; font-size: .85rem; }
"""
# The policy makes the browser enforce what the page promises: nothing is loaded from anywhere.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
_CLAIM_ROWS = (
    ("neighbouring relation", "relation"),
    ("privacy unit", "unit"),
    ("mechanism", "mechanism"),
    ("releases", "num_releases"),
    ("accountant", "accountant"),
    ("sampler", "sampler"),
)
_SIZE_ROWS = (
    ("synthetic images", "num_samples"),
    ("real test images, fidelity", "num_reference"),
    ("real test images, accuracy", "num_test"),
)
_GROUPS = (
    ("Budget", "budget"),
    ("Mechanism", "mechanism"),
    ("Sampler", "sampler"),
    ("Data", "data"),
    ("Model", "model"),
    ("Cost", "cost"),
    ("Versions", "versions"),
)


def render_page(card: Mapping[str, Any], *, sample_grid: bytes | None = None) -> str:
    """Return the page of a card.

    Args:
        card: `RunCard.to_dict()`.
        sample_grid: The grid's PNG, or None.

    Returns: A complete HTML document.
    """
    body = [
        _header(card),
        _tiles(card),
        _claim(card),
        _quality(card["evaluation"]),
        _pictures(card, sample_grid),
        _groups(card),
        _config(card["config"]),
    ]
    return html_page(card["title"], "\n".join(part for part in body if part))


def html_page(title: str, body: str) -> str:
    """Return a complete HTML document in the house style.

    Args:
        title: Text; escaped here.
        body: HTML; its values escaped by the caller.
    """
    return _PAGE.format(title=escape(title), style=_STYLE, body=body)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of names and values."""
    cells = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n' for name, value in rows)
    return f"<table>\n{cells}</table>"


def _list(title: str, texts: Sequence[Any], none: str) -> str:
    items = "".join(f"<li>{escape(str(text))}</li>" for text in texts)
    return f"<h3>{escape(title)}</h3>" + (f"<ul>{items}</ul>" if items else f'<p class="soft">{escape(none)}</p>')


def _value_text(name: str, value: Any) -> str:
    """Return one value of a group: durations as time, memory with its unit, nested values as JSON."""
    if name.endswith("_s") and isinstance(value, int | float):
        return seconds_text(value)
    if isinstance(value, list | dict):
        return json.dumps(value)
    return number_text(value)


def _header(card: Mapping[str, Any]) -> str:
    return (
        f'<h1>{escape(card["title"])}</h1>\n<p class="soft">Run {escape(card["run_id"])}, {escape(card["created"])}</p>'
    )


def _level(card: Mapping[str, Any]) -> str:
    return escape(str(card["claim"]["level"]).upper())


def _tiles(card: Mapping[str, Any]) -> str:
    """Return the few numbers that most readers come for."""
    claim, evaluation, cost = card["claim"], card["evaluation"], card["cost"]
    tiles = [(_level(card), "claim level")]
    if is_proved(claim):
        tiles.insert(0, (ceil_text(claim["epsilon"]), f"epsilon at delta {number_text(claim['delta'])}"))
    if evaluation is not None:
        if "fid" in evaluation:
            tiles.append((number_text(evaluation["fid"]), f"FID, {evaluation['fid_extractor']}"))
        tiles += [(number_text(value), f"{name} accuracy") for name, value in evaluation["accuracy"].items()]
    if "total_time_s" in cost:
        tiles.append((seconds_text(cost["total_time_s"]), "time"))
    cells = "".join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in tiles)
    return f'<div class="tiles">{cells}</div>'


def _claim(card: Mapping[str, Any]) -> str:
    """Return the claim in full: what holds, under which assumptions, and what it does not cover."""
    claim, level = card["claim"], _level(card)
    rows = []
    if is_proved(claim):
        rows += [("epsilon", ceil_text(claim["epsilon"])), ("delta", number_text(claim["delta"]))]
    rows += [(name, number_text(claim[key])) for name, key in _CLAIM_ROWS if claim.get(key) is not None]
    rows.append(("seed policy", card["seed_policy"]))
    warnings = "".join(f'<p class="warning">{escape(str(text))}</p>' for text in claim.get("warnings", ()))
    return (
        f'<section><h2>Privacy claim <span class="level {level}">{level}</span></h2>\n'
        f'<p class="statement">{escape(card["claim_statement"])}</p>{warnings}\n{_table(rows)}\n'
        + _list("Assumptions", claim.get("assumptions", ()), "None beyond the mechanism's own.")
        + _list("Not covered", claim.get("not_covered", ()), "Nothing was named.")
        + "</section>"
    )


def _quality(evaluation: Mapping[str, Any] | None) -> str:
    """Return the metric table with extractor, sizes and protocol."""
    if evaluation is None:
        return '<section><h2>Quality</h2><p class="soft">This run was not evaluated.</p></section>'
    if "fid" not in evaluation:
        return _classifier_quality(evaluation)
    rows = [(f"FID ({evaluation['fid_extractor']})", number_text(evaluation["fid"]))]
    rows += [(name, number_text(evaluation[name])) for name in ("kid", "precision", "recall") if name in evaluation]
    rows += [(f"accuracy, {name}", number_text(value)) for name, value in evaluation["accuracy"].items()]
    rows += [(name, number_text(evaluation[key])) for name, key in _SIZE_ROWS if key in evaluation]
    rows.append(("protocol hash", evaluation["protocol_hash"]))
    notes = "".join(f'<p class="warning">{escape(str(text))}</p>' for text in evaluation.get("warnings", ()))
    return (
        f"<section><h2>Quality of the synthetic images</h2>{notes}\n{_table(rows)}\n"
        '<p class="soft">Against the real test split. An FID compares only with FIDs of the same extractor and '
        "protocol hash; accuracy is that of classifiers trained on synthetic images alone.</p></section>"
    )


def _classifier_quality(evaluation: Mapping[str, Any]) -> str:
    """Return the accuracy of a released classifier."""
    rows = [(f"accuracy, {name} split", number_text(value)) for name, value in evaluation["accuracy"].items()]
    rows.append(("real test images", number_text(evaluation["num_test"])))
    return (
        f"<section><h2>Quality of the classifier</h2>{_table(rows)}\n"
        '<p class="soft">On the real test split, which is no part of the training records.</p></section>'
    )


def _figure(png: bytes, alt: str, caption: str = "", kind: str = "") -> str:
    data = b64encode(png).decode("ascii")
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img class="{kind}" alt="{escape(alt)}" src="data:image/png;base64,{data}">{text}</figure>'


def _pictures(card: Mapping[str, Any], sample_grid: bytes | None) -> str:
    """Return the sample grid and the plots over the releases."""
    sections = []
    if sample_grid is not None:
        figure = _figure(sample_grid, "Grid of synthetic images", "One row per class, class 0 on top.", "pixels")
        sections.append(f"<section><h2>Samples</h2>{figure}</section>")
    if is_proved(card["claim"]) and card["epsilon_curve"]:
        png = epsilon_plot(card["epsilon_curve"], target=card["budget"].get("target_epsilon"))
        plot = _figure(png, "Epsilon spent over the releases")
        sections.append(f'<section><h2>Over the releases</h2><div class="columns">{plot}</div></section>')
    return "\n".join(sections)


def _groups(card: Mapping[str, Any]) -> str:
    """Return one small table per group of settings that is not empty."""
    parts = []
    for title, key in _GROUPS:
        if card[key]:
            rows = [(name.replace("_", " "), _value_text(name, value)) for name, value in card[key].items()]
            parts.append(f"<section><h2>{title}</h2>{_table(rows)}</section>")
    return f'<div class="columns">{"".join(parts)}</div>' if parts else ""


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    text = escape(json.dumps(config, indent=2))
    return f"<section><details><summary>Resolved configuration</summary><pre>{text}</pre></details></section>"
