"""Information flow (2.1)."""

from anchors.flow.metrics import Sums, flow_sums
from anchors.flow.saliency import Flow, flow, literal_flow

__all__ = ["Flow", "Sums", "flow", "flow_sums", "literal_flow"]
