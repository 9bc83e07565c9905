"""What a training's log comes to."""

import pandas as pd

SHOWN = ("label_loss", "accuracy", "knowable", "text_loss")


def held_out(log: pd.DataFrame) -> pd.DataFrame:
    """The last evaluation on held-out sequences.

    Args:
        log: of a training, see `anchors.nsa.training.train.Trained`; of several with columns `run` and `seed`.

    Returns:
        One row per run and seed, where there are any, and number of the demonstration: step, and of `SHOWN` what was measured;
        losses in nats.
    """
    own, by = log[log["split"] == "held_out"], [name for name in ("run", "seed") if name in log]
    last = own.groupby(by)["step"].transform("max") if by else own["step"].max()
    keys = [*by, "step", "bucket"]
    wide = own[own["step"] == last].pivot_table(index=keys, columns="metric", values="value", sort=False)
    found = wide[[name for name in SHOWN if name in wide]].reset_index()
    return found.rename(columns={"bucket": "demonstration"}).rename_axis(columns=None)
