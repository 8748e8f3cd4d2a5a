"""One file per section of the report: its tables and its figures."""
