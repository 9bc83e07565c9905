"""Where the study of isolation stood in 0.4.0; it is in `anchors.analyses.isolation`."""

from anchors.analyses.isolation import SIDES, TARGETS, Isolation, TopWords, isolated_contexts

__all__ = ["SIDES", "TARGETS", "Isolation", "TopWords", "isolated_contexts"]
