"""Every number of the toolkit on every family of transformers, against a computation that uses nothing of the toolkit."""
