"""An example: an estimator for layerif in a package of its own."""
