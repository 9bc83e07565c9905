"""One file per table or figure of a paper: a frozen grid and the rows it yields."""
