"""`python -m layerif`: the same as the command `layerif`."""

from layerif.app.main import main

if __name__ == "__main__":
    main()
