"""Training of heads on a frozen target.  Knows no architecture or recipe by name but in its registry, `recipes`."""
