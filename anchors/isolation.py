"""Where the study of isolation stood in 0.4.0; it is in `anchors.analyses.isolation`."""

from anchors._names import forwarding, unknown

__getattr__ = forwarding(
    __name__,
    unknown(__name__),
    dict.fromkeys(
        ("SIDES", "TARGETS", "Isolation", "TopWords", "isolated_contexts"), "anchors.analyses.isolation"
    ),
)
