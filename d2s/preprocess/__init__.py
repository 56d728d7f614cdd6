"""From image files to pixel arrays, and from captions to token ids."""
