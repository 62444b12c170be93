"""The command line. `app` holds the program, and each command is in a file of its name, with its options.

`options` has the options that several commands share. `checks` and `choices` are what is known of arguments
before torch is imported; `loading`, `plans` and `tables` are what commands need afterwards. Imports every
room, and torch only inside the functions of commands.
"""
