"""From files to batches of views: data sets, crops, photometric augmentation, sampling."""
