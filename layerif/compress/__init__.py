"""A smaller model: fewer blocks, fewer bits."""
