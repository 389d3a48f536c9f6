"""What a mesh adds to the spine: which device holds which slots, and how devices exchange what they saw."""
