"""
The command line: arguments in, one call, text out.

`cli` names the commands, one file each beside it. In go what somebody typed, out come lines on stdout, errors
on stderr and an exit code. What a command does lies in the other rooms; nobody imports this one.
"""
