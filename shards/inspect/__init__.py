"""What a data set holds, and whether it is whole."""
