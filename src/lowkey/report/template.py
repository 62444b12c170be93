"""The pages around the numbers: one file each, no network. `page` and `comparison` fill in the `$names` with
escaped text. Only a comparison has a script, which sorts its tables.
"""

from __future__ import annotations

from string import Template

# The policy makes a browser refuse whatever markup could slip in: nothing is fetched, and nothing runs but a
# script whose checksum it names.
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:$scripts">
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
$end</body>
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
@media screen and (prefers-color-scheme: dark) {
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
td.better { color: var(--series-2); } td.worse { color: var(--series-4); }
a { color: var(--series-0); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--series-0); outline-offset: 2px; }
th[aria-sort] button::after { content: " \\25B2"; } th[aria-sort="descending"] button::after { content: " \\25BC"; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  :root { font-size: 12px; } body { background: #ffffff; font-size: 1rem; } main { max-width: none; padding: 0; }
  section { border: 0; padding: 0; } figure, tr, dl > * { break-inside: avoid; } h2, h3, summary { break-after: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; } .plot svg { min-width: 0; max-height: 125mm; }
  th, td { padding: .2rem .4rem; white-space: normal; } a { color: inherit; }
}
"""

# Sorts tables by the column whose heading is clicked; cells without a number come last.
SORTING = """
const number = (cell) => cell.dataset.value === "" ? NaN : Number(cell.dataset.value ?? NaN);
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map((row) => [row, row.cells[column]]);
      const numbers = rows.some(([, cell]) => !Number.isNaN(number(cell)));
      rows.sort(([, a], [, b]) => {
        if (!numbers) return way * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
        const [x, y] = [number(a), number(b)];
        return Number.isNaN(x) - Number.isNaN(y) || way * (x - y) || 0;
      });
      table.tBodies[0].append(...rows.map(([row]) => row));
    });
  });
}
"""

COMPARISON_GUIDE = """<p class="guide">Every table compares settings on the same samples: windows of text, recall cases, questions,
or documents of a task. A heading that is clicked sorts its table.</p>
<dl>
<dt>Kept</dt><dd>Bytes held as a share of what the full cache holds for the same tokens.</dd>
<dt>Score, ±</dt><dd>What the setting reached, and half of the 95 % interval over samples; in brackets where the full cache fails the task itself.</dd>
<dt>Against full</dt><dd>The mean difference from the full cache over the samples, in nats per token for perplexities, with its 95 % interval by a paired bootstrap of 2000 draws. ▲ better and ▼ worse say that the interval does not hold 0; = says that these samples cannot tell.</dd>
<dt>Better, Worse</dt><dd>On how many samples the setting is better or worse than the full cache; the others are even.</dd>
<dt>★</dt><dd>On the frontier: no other setting is at least as good with fewer bytes.</dd>
<dt>3:1</dt><dd>Won and lost samples of the setting of the row against that of the column; the interval appears under the pointer.</dd>
<dt>Intervals</dt><dd>Many pairs are compared, so about one even pair in twenty looks decided by chance.</dd>
</dl>"""

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
