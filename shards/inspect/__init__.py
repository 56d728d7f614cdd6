"""Shows what a data set contains, and checks it for damage."""
