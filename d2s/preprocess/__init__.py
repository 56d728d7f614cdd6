"""Images and captions to arrays and token ids."""
