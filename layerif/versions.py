"""The versions of everything that the store keeps. Raise one when the meaning of its files changes.

Each version is part of the store's keys, so measurements of another version are not found again, and `layerif-store`
marks them.
"""

VERSIONS = {
    "store": 2,  # the format of a file
    "probe": 1,  # Grams
    "loss": 1,
    "ekfac": 1,
    "spectra": 1,
    "activations": 1,
    "removals": 1,
    "gates": 2,
    "loss_curves": 1,
    "measured_loss": 1,
    "format_errors": 1,
    "skips": 1,
    "spans": 1,
}
