"""Pre-training of the micro ViT that ships with the package, on rendered letters."""
