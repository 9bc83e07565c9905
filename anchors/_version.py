"""The version of the installed distribution; read when `anchors.__version__` is first asked for."""

from importlib.metadata import version

__version__ = version("label-anchors")
