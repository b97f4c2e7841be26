"""Tools for testing methods, independent of pytest: checks of the contract, processes, kills, a pretended GPU, and
reference cases."""
