"""Stand-ins with which other frameworks run on a machine without an accelerator; for tests and small trials."""
