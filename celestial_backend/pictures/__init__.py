"""
From the value in a task's data to a picture.

In goes what a stranger wrote into a task; out comes a decoded picture, or an error that says why not. `reader` asks
the sources in turn, `folders` are those on disk, `download` is the network, `decode` turns bytes into pixels. Every
step has limits of time, bytes and pixels, and nothing outside the allowed folders and hosts is ever read.
"""
