"""
Label Studio, as the backend asks it.

`client` knows its address and its token, and what its refusals mean; `project` reads and writes one project: its
labels, its tasks, its predictions, its version; `setup` makes a project ready: label config, pictures, model,
webhook. In go numbers of projects, out come plain values. Nothing else in the package talks to Label Studio, except
to fetch the pictures that it keeps.
"""
