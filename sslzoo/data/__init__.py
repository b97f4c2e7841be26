"""Data sets, image decoding, sampling, crops and photometric augmentation."""
