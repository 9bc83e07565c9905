"""Where `anchors.nsa.probe_tables` was in 0.4.0."""

from anchors._names import forwarding, unknown

__getattr__ = forwarding(
    __name__,
    unknown(__name__),
    dict.fromkeys(
        (
            "BRANCHES", "OUTCOMES", "PAIRS", "PERMUTATIONS", "PLAIN", "Choices", "Samples", "bootstrap", "choices", "control_of", "null_rates",
            "probe_tables", "sign_test",
        ),
        "anchors.nsa.probe_tables",
    ),
)  # fmt: skip
