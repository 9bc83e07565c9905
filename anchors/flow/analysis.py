"""Where the studies of the information flow stood in 0.4.0; they are in `anchors.analyses.flow`."""

from anchors._names import forwarding, unknown

__getattr__ = forwarding(
    __name__, unknown(__name__), dict.fromkeys(("FlowMap", "InformationFlow"), "anchors.analyses.flow")
)
