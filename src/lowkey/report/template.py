"""The page around the numbers: one file, no script, no network. `page` fills in the `$names` with escaped
text.
"""

from __future__ import annotations

from string import Template

# The policy makes a browser refuse whatever markup could slip in: nothing is fetched and nothing runs.
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>
$style
</style>
</head>
<body>
<main>
<header>
<p class="brand">lowkey report</p>
<h1>$title</h1>
$summary
</header>
$sections
<section aria-labelledby="environment">
<h2 id="environment">Environment</h2>
$environment
</section>
<section aria-labelledby="guide">
<h2 id="guide">How to read this</h2>
$guide
</section>
</main>
</body>
</html>
""")

FIGURE = Template("""<figure>
<div class="scroll plot" tabindex="0" role="region" aria-label="$name">$svg</div>
<figcaption>$caption</figcaption>
</figure>
""")

TABLE = Template("""<div class="scroll" tabindex="0" role="region" aria-label="$caption">
<table>
<caption>$caption</caption>
<thead><tr>$head</tr></thead>
<tbody>
$body
</tbody>
</table>
</div>
""")

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f4f6f8; --surface: #ffffff; --ink: #1d2430; --muted: #5b6573; --rule: #d9dee5; --tint: #eef3fa;
  --series-0: #2360b5; --series-1: #b05a08; --series-2: #2b7a4b; --series-3: #7749b3; --series-4: #b0334a; --series-5: #0f7482;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1319; --surface: #171c24; --ink: #e6eaf0; --muted: #9aa5b4; --rule: #2f3845; --tint: #1e2836;
    --series-0: #74aaf5; --series-1: #efa657; --series-2: #6cc891; --series-3: #b99bf2; --series-4: #f2859a; --series-5: #56c2d0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { margin-bottom: 2rem; }
.brand { margin: 0; color: var(--muted); font-size: .8rem; letter-spacing: .08em; text-transform: uppercase; }
h1 { margin: .15rem 0 .6rem; font-size: 2rem; line-height: 1.2; }
h2 { margin: 0 0 .8rem; font-size: 1.3rem; }
h3 { margin: 1.6rem 0 .5rem; font-size: 1.02rem; }
.lead { margin: .3rem 0; max-width: 52rem; font-size: 1.1rem; }
.warning { margin: .8rem 0; padding: .6rem .9rem; border-left: 4px solid var(--series-1); background: var(--tint); }
.warning, .lead, h1, h2, h3, summary, dd { overflow-wrap: anywhere; }
section {
  margin: 0 0 1.5rem; padding: 1.4rem 1.5rem 1.5rem; background: var(--surface); border: 1px solid var(--rule); border-radius: 10px;
}
figure { margin: 0 0 1.2rem; }
figcaption, caption { color: var(--muted); font-size: .88rem; text-align: left; }
figcaption { max-width: 52rem; }
caption { padding-bottom: .5rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--series-0); outline-offset: 2px; }
.plot svg { display: block; width: 100%; min-width: 720px; height: auto; }
.plot svg * { stroke-linejoin: round; }
.plot svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
thead th { color: var(--muted); font-weight: 600; border-bottom-width: 2px; }
th.text, td.text { text-align: left; }
tbody th { font-weight: 600; text-align: left; }
.scroll > table th:first-child { position: sticky; left: 0; z-index: 1; background: var(--surface); }
tbody tr.full > * { background: var(--tint); }
.scroll > table tr.full th:first-child { background: var(--tint); }
details { margin-top: 1rem; border-top: 1px solid var(--rule); padding-top: .8rem; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: 0; font-size: .93rem; }
dt { font-weight: 600; }
dd { margin: 0; }
dl.environment dd { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .85rem; }
p.guide { max-width: 52rem; margin: 0 0 1rem; }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } section { padding: 1rem; } }
@media print { body { background: #ffffff; } section { break-inside: avoid; border: 0; padding: 0; } }
"""

GUIDE = (
    "Every row is one cache, measured on the same model and text as the full cache above it. A dash means "
    "that the number was not "
    "measured; a column that no row measured is left out. In the plots, left is smaller and the dashed line "
    "is the full cache (its KL "
    "of 0 has no place on a log scale). In heat maps of errors one cell is one pair of ranks, darker is a "
    "smaller error, and the white "
    "dot is the pair that was chosen; in those of kept tokens one cell is one KV head of one layer, and "
    "brighter is more."
)
