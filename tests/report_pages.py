"""Results made up for reports, and the page that a report writes."""

from __future__ import annotations

import copy
from html.parser import HTMLParser

RANKS = [4, 8, 16, 32]
PROFILE = {
    "ranks": RANKS,
    "surface": [[[1 / (k * v) for v in RANKS] for k in RANKS] for _ in range(2)],
    "chosen": [[8, 32], [12, 4]],  # 12 lies between two candidates
    "layers": [3, 5],
    "spectra": {"keys": [[4.0, 2.0, 1.0], [8.0, 1.0, 0.0]], "values": [[3.0, 2.0, 1.0], [3.0, None, 1.0]]},
}
FULL = {
    "name": "full",
    "method": None,
    "plan": None,
    "policy": None,
    "budget": None,
    "bits": None,
    "layout": "full",
    "task": "perplexity",
    "perplexity": 11.92,
    "perplexity_decode": None,
    "kl": 0.0,
    "top1_agreement": 1.0,
    "layer_error": 0.0,
    "layer_cosine": 1.0,
    "exact_match": None,
    "bytes_per_token": 2048,
    "bytes_held": 2**20,
    "bytes_predicted": 2**20,
    "bytes_full": 2**20,
    "prefill_ms": 120.0,
    "step_ms": None,
}
HALF = FULL | {
    "name": "stiefattention 50%",
    "method": "stiefattention",
    "budget": "50%",
    "perplexity": 12.314,
    "kl": 0.0312,
    "top1_agreement": 0.941,
    "layer_error": 0.088,
    "layer_cosine": 0.9969,
    "bytes_per_token": 1024,
    "bytes_held": 2**19,
    "bytes_predicted": 2**19,
}
ENVIRONMENT = {
    "lowkey": "0.1.0",
    "cpu": "EPYC",
    "command": "lowkey eval tiny",
    "data": {"name": "alice", "sha256": "aa", "tokens": 40960},
}
HOSTILE = '</title></svg><script>alert("$x_{")</script> id="x" #1d2430'


def result(*rows: dict, model: str = "tiny", sha256: str = "aa") -> dict:
    """A result file of these rows."""
    environment = copy.deepcopy(ENVIRONMENT)
    environment["data"]["sha256"] = sha256
    return {"format": 1, "model": model, "environment": environment, "rows": list(rows)}


class Page(HTMLParser):
    """What a browser would see: every start tag, and the table as lists of cell texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.table: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag in ("td", "th")
        if tag == "tr":
            self.table.append([])
        elif self.inside:
            self.table[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.table[-1][-1] += data

    def cell(self, line: int, title: str) -> str:
        return self.table[line][self.table[0].index(title)]

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
