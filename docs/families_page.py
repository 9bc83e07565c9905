"""The page of all families, the package's file of them and the sentences about them, from the sweep's table.

uv run python docs/families_page.py
"""

import csv
import json
import re
from collections import defaultdict
from pathlib import Path

from anchors.families import VERBS, Family, families, summary

HERE = Path(__file__).parent
TABLE = HERE.parent / "experiments" / "families" / "families.csv"
KEPT = HERE.parent / "anchors" / "families.json"
SENTENCES = {HERE / "models-tasks-data.md": "families"}
"""By page: the mark between which the summary stands."""
OPENING = """# Families

Every family of transformers, as a tiny random model with attention far from uniform, against its own eager attention, autograd
and loops (`uv run benchmarks/families.py`, versions in the last column). **Exact**: every number that the verb rests on is
within the tolerances of `benchmarks/sweep/family.py`; the largest error stands beside it. **Refused**: the verb ends with
the reason that is given. `anchors check --families` prints this table, `anchors check MODEL` certifies a model of yours.

"""


def kept() -> str:
    """What `anchors.families` reads."""
    rows = defaultdict(list)
    with TABLE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows[row["kind"], row["family"]].append(row)
    reasons, versions, found = [""], [], []
    for (kind, name), own in rows.items():
        bad = next((row["reason"] for row in own if row["verdict"] != "exact" and row["reason"]), "")
        reason = re.sub(
            r" ?(\d+ [a-z-]+ f|F)amilies (are )?known to work: [^.]*\.",
            "",
            re.sub(r"\S*/families-\S+", "…", bad),
        )
        for text, texts in ((reason, reasons), (own[0]["transformers"], versions)):
            if text not in texts:
                texts.append(text)
        errors = [float(row["error"]) for row in own if row["verdict"] == "exact" and row["error"]]
        facts = {
            "name": name,
            "kind": kind,
            "numbers": {row["number"]: row["verdict"] for row in own if row["number"] != "certificate"},
            "error": float(f"{max(errors):.1e}") if errors else None,
        }
        found.append([facts, reasons.index(reason), versions.index(own[0]["transformers"])])
    lists = ",\n".join(json.dumps(one, ensure_ascii=False) for one in found)
    head = json.dumps({"transformers": versions, "reasons": reasons}, ensure_ascii=False, indent=0)
    return f'{head[:-2]},\n"families": [\n{lists}\n]}}\n'


def page() -> str:
    """One table a kind."""
    parts = [OPENING, summary()[0].upper() + summary()[1:] + ".\n"]
    for kind, heading in (("causal", "Language models"), ("image-text", "Vision-language models")):
        own, verbs = [f for f in families() if f.kind == kind], VERBS[kind]
        parts.append(
            f"\n## {heading}\n\n| family | {' | '.join(verbs)} | largest error | reason | transformers |\n"
        )
        parts.append("|---" * (len(verbs) + 4) + "|\n")
        parts += [line(f) for f in own]
    return "".join(parts)


def line(family: Family) -> str:
    marks = ["✓" if verdict == "exact" else verdict for verdict in family.verbs.values()]
    error = "" if family.error is None else f"{family.error:.0e}"
    reason = family.reason.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
    return f"| `{family.name}` | {' | '.join(marks)} | {error} | {reason} | {family.transformers} |\n"


def with_summary(text: str, mark: str) -> str:
    """A page with the summary of today between its marks."""
    return re.sub(
        rf"(<!-- {mark} -->).*?(<!-- /{mark} -->)",
        lambda m: f"{m[1]}{summary()}{m[2]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    KEPT.write_text(kept(), encoding="utf-8")
    families.cache_clear()
    (HERE / "families.md").write_text(page(), encoding="utf-8")
    for path, mark in SENTENCES.items():
        path.write_text(with_summary(path.read_text(encoding="utf-8"), mark), encoding="utf-8")
