"""The versions of everything that the store keeps. Raise one when the meaning of its files changes.

Each version is part of the store's keys, so measurements of another version are not found again, and `layerif-store`
marks them.
"""

VERSIONS = {
    "store": 2,  # the format of a file
    "probe": 1,  # Grams
    "gradients": 1,  # projected, of each sample
    "loss": 1,
    "curvature": 1,
    "spectra": 1,
    "activations": 2,
    "removals": 1,
    "gates": 2,
    "loss_curves": 2,
    "gains": 1,
    "measured_loss": 1,
    "format_errors": 2,
    "skips": 1,
    "expert_outputs": 1,
    "spans": 1,
    "update_masks": 1,
    "token_losses": 1,
    "mastery": 1,
}
