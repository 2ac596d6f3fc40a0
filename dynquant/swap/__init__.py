"""What is swapped for what: types, names and configs read into a plan."""
