"""The methods that come with sslzoo, with one folder and one entry point each."""
