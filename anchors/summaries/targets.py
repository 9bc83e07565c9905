"""Tables of the flow into the last token of prompts that need no label words."""

import pandas as pd

from anchors.stats import refuse_doubles, summarise

METRICS = ("s_tq", "s_ww", "first_token", "entropy")
"""By layer: the means of the flow, the share of the first token in what flows into the target, the entropy of all shares."""
_UNIT = ["task", "seed", "number"]


def target_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What flows into the target, by layer; from which tokens; and what each prompt aims at.

    `sources`: of every prompt and layer the strongest tokens with their positions, I_l[q, j] and its share in all that flows into
    the target. `prompts`: what was aimed at, with ids, loss in nats, the target's probability and the model's own next token's id.
    """
    refuse_doubles(rows)
    return {
        "summary": summarise(rows, METRICS),
        "sources": _sources(rows),
        "prompts": _prompts(rows),
    }


def _sources(rows: pd.DataFrame) -> pd.DataFrame:
    tokens, own = (rows[rows["metric"].str.startswith(kind)] for kind in ("token/", "source/"))
    words = _placed(tokens).assign(token=tokens["metric"].str.split("/", n=2).str[2])
    wide = rows[rows["metric"] == "s_tq"].set_index([*_UNIT, "layer"])["value"]
    count = rows[rows["metric"] == "tokens"].set_index(_UNIT)["value"]
    place = [*_UNIT, "position"]
    found = _placed(own)[[*place, "layer", "value"]].merge(words[[*place, "token"]], on=place)
    found = found.join(wide.rename("mean"), on=[*_UNIT, "layer"]).join(count.rename("tokens"), on=_UNIT)
    into = found["mean"] * (found["tokens"] - 1)
    found["share"] = (found["value"] / into).where(into > 0)
    found = found.sort_values([*_UNIT, "layer", "value"], ascending=[True] * 4 + [False], kind="stable")
    found["rank"] = found.groupby([*_UNIT, "layer"]).cumcount() + 1
    return found[[*_UNIT, "layer", "rank", "position", "token", "value", "share"]].reset_index(drop=True)


def _placed(rows: pd.DataFrame) -> pd.DataFrame:
    """With the position that stands in the name of the metric."""
    return rows.assign(position=rows["metric"].str.split("/", n=2).str[1].astype(int))


def _prompts(rows: pd.DataFrame) -> pd.DataFrame:
    found = []
    for key, part in rows[rows["layer"].isna() & (rows["number"] >= 0)].groupby(_UNIT, sort=False):
        facts = dict(zip(_UNIT, key, strict=True))
        for name in ("target", "against"):
            own = part[part["metric"].str.startswith(f"{name}/")]
            facts[name] = own["metric"].iloc[0].split("/", 1)[1] if len(own) else None
            facts[f"{name}_id"] = int(own["value"].iloc[0]) if len(own) else None
        values = part.drop_duplicates("metric").set_index("metric")["value"]
        facts |= {name: float(values[name]) for name in ("loss", "probability")}
        found.append(facts | {"predicted_id": int(values["predicted"]), "tokens": int(values["tokens"])})
    return pd.DataFrame(found).astype({"against_id": "Int64"})
