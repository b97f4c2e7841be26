"""What a method's tests need, without pytest: the promises and their checks, processes, kills, a pretended GPU,
reference cases."""
