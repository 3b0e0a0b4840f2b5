"""One short file per paper: a scorer (or other part) and a factory that returns a recipe."""
