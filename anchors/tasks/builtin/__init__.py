"""Small labelled sets that come with the toolkit; see README.md beside this file."""
