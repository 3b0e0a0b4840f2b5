"""The quality tasks answered by kvpress, in an environment of its own: rows beside our own."""
