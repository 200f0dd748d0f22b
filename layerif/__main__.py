"""`python -m layerif`: the same as the command `layerif`."""

from layerif.app.commands import layerif

if __name__ == "__main__":
    layerif()
