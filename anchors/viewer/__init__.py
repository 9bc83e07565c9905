"""One self-contained HTML page that shows where a model's information flows on a few prompts."""

from .page import Page, edges, render_page

__all__ = ["Page", "edges", "render_page"]
