"""The command line. `app` is the program, and each command is in a file of its name, with its options.

`options` has the options that several commands share. `checks` and `choices` check arguments before torch is
imported; `loading`, `plans` and `tables` are what commands need afterwards. May import every room, but torch
only inside the functions of commands.
"""
