"""Where the studies of the information flow stood in 0.4.0; they are in `anchors.analyses.flow`."""

from anchors.analyses.flow import FlowMap, InformationFlow

__all__ = ["FlowMap", "InformationFlow"]
