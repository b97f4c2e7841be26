"""The methods that ship with sslzoo: one folder each, one entry point each."""
