"""The order of samples and the random draws, as pure functions."""
