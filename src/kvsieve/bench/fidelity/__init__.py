"""How far a compressed cache moves what a model says, measured without a task."""
