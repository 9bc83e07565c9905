"""One self-contained HTML page that shows where a model's information flows on a few prompts."""

from .page import edges, render_page

__all__ = ["edges", "render_page"]
