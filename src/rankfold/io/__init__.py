"""What lies on disk, for everyone: files, models, weights, assets, cache."""
