"""What ``sslzoo eval`` offers. Imports nothing, because every start of the command reads it."""

KINDS = ("linear", "knn", "logistic", "features")
FORMATS = ("safetensors", "npy", "parquet")  # of files with features; the first is the default
KEEP = 16.0  # GiB of features that stay on disk after an evaluation: ImageNet's of 2,048 numbers take 10
