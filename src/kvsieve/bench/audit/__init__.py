"""What compression breaks: instructions that are forgotten, secrets that are told."""
