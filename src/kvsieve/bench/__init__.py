"""Measurements on this machine: what ``kvsieve bench`` runs. Rows are plain JSON objects."""
