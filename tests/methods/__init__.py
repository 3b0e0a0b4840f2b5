"""One test file per method: the score against a loop from the formula, and which slots stay."""
