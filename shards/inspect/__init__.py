"""Shows the contents of a data set, and checks data sets for damage."""
