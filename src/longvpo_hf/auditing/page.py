"""An audit as one HTML page that needs nothing but itself, and as JSON beside it."""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path

from longvpo_hf.artifacts import write_text
from longvpo_hf.auditing.findings import Audit, Finding, Verdict

_STYLE = """
:root{color-scheme:light dark;--soft:#667;--line:#8884;--pass:#18794e;--warn:#8a5a00;--fail:#b42318;--unknown:#667}
@media(prefers-color-scheme:dark){:root{--soft:#9aa;--pass:#5cc994;--warn:#e0ac4b;--fail:#ff8a7a;--unknown:#9aa}}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:2rem 1rem 4rem}
h1{margin:0 0 .25rem;overflow-wrap:anywhere}.over,.soft{color:var(--soft)}.over{margin:0}
article{border-top:1px solid var(--line);padding:1rem 0}h2{font-size:1.1rem;margin:0}
.verdict{display:inline-block;min-width:8.5em;font-weight:600}.pass{color:var(--pass)}.warn{color:var(--warn)}
.fail{color:var(--fail)}.unknown{color:var(--unknown)}p{margin:.3rem 0;overflow-wrap:anywhere}
table{border-collapse:collapse;font-size:.9rem;margin-top:.5rem}td{padding:.15rem 1.25rem .15rem 0;vertical-align:top;
overflow-wrap:anywhere}summary{cursor:pointer;color:var(--soft)}code{font-size:.9em}
"""
_SYMBOLS = {Verdict.PASS: "✓ pass", Verdict.WARN: "! warn", Verdict.FAIL: "✗ fail", Verdict.UNKNOWN: "? not measured"}


def write_audit(audit: Audit, page: Path) -> None:
    """Writes the page, and the JSON beside it under the same name."""
    write_text(page.with_suffix(".json"), audit.to_json() + "\n")
    write_text(page, _page(audit))


def _page(audit: Audit) -> str:
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    counts = [
        f'<span class="{verdict}">{sum(f.verdict is verdict for f in audit.findings)} {symbol[2:]}</span>'
        for verdict, symbol in _SYMBOLS.items()
    ]
    read = "" if audit.num_read == audit.num_rows else f" The texts of {audit.num_read:,} of them were compared."
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{_escaped(audit.name)} · longvpo audit</title>
<style>{_STYLE}</style>
</head>
<body>
<p class="over">longvpo audit</p>
<h1>{_escaped(audit.name)}</h1>
<p>{audit.num_rows:,} rows.{read} {" · ".join(reversed(counts))}</p>
<p class="soft">Most items are judges that see no video: rules that pick the chosen answer of a row from the texts
alone. A coin is right in half of the rows. A judge that is right in more has found what a model would learn instead of
looking.</p>
{"".join(map(_article, audit.findings))}
</body>
</html>
"""


def _article(finding: Finding) -> str:
    rows = "".join(f"<tr><td>{_escaped(a)}</td><td>{_escaped(b)}</td></tr>" for a, b in finding.details)
    examples = ", ".join(f"<code>{_escaped(row)}</code>" for row in finding.examples)
    is_bad = finding.verdict.is_at_least(Verdict.WARN)
    verdict = f'<span class="verdict {finding.verdict}">{_SYMBOLS[finding.verdict]}</span>'
    parts = [
        f"<h2>{verdict} {_escaped(finding.title)}</h2>",
        f"<p>{_escaped(finding.said)}</p>",
        f"<p>→ {_escaped(finding.remedy)}</p>" if is_bad and finding.remedy else "",
        f'<p class="soft">{_escaped(finding.name)}: {_escaped(finding.threshold)}</p>' if finding.threshold else "",
        f"<details{' open' if is_bad else ''}><summary>Numbers</summary><table>{rows}</table></details>"
        if rows
        else "",
        f"<details><summary>Rows</summary><p>{examples}</p></details>" if examples and is_bad else "",
    ]
    return f"<article>{''.join(parts)}</article>\n"


def _escaped(text: object) -> str:
    """Text as HTML shows it; a lone half of a character is shown as its escape."""
    return html.escape(str(text).encode("utf-8", "backslashreplace").decode("utf-8"))
