"""
What is wrong with a set-up, and what puts it right.

In go the services and, if one is named, a project; out come findings: ok, a warning or a failure, each with what
was seen and a remedy that works. `machine` looks at this machine, `studio` at Label Studio and its projects. It
looks only: what it may put right, it does where the caller asked for that.
"""
