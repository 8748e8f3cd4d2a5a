"""Where ranks run. A testbed starts a rank program; it does not know what the program does."""
