"""kvsieve against numbers that other people's code computed; see vectors/README.md."""
