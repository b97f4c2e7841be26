"""The command line: one file a verb, no logic, heavy imports only inside the verb.

A verb is a module here with ``add_arguments(parser)`` and ``run(args) -> int``, the exit code. Its name is the
file's, with ``-`` for ``_``; the first line of its docstring is its help. Where the options depend on the first word
after the verb, ``add_arguments_of(parser, word)`` adds the rest of them.
"""
