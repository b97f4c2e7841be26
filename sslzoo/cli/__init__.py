"""The command line: one file per verb, no logic, slow imports only inside functions.

A verb is a module here with ``add_arguments(parser)`` and ``run(args) -> int``, which returns the exit code. It is
named after its file, with ``-`` for ``_``; the first line of its docstring is its help text. If its options depend on
the first word after the verb, ``add_arguments_of(parser, word)`` adds them.
"""
