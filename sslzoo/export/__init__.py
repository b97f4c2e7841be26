"""Encoders that leave: files that other libraries load, each verified by loading it without sslzoo."""
