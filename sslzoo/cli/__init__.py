"""The command line: one file a verb, no logic, heavy imports only inside the verb."""
