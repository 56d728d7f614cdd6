"""Configuration, recipes, checks before work, the training loop, its log and its folder."""
